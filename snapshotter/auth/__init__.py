"""Where registry credentials come from: one ordered chain of sources."""
