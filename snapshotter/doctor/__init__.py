"""`nydusctl doctor`: what is wrong on this node, and what to do about it. Each check only looks; nothing is changed."""
