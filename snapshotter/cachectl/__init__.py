"""`nydusctl cache`: what the cache of a node holds, whether it is right, what of it nobody uses, and filling it."""
