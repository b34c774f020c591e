"""Images that run lazily although containerd pulls them as plain ones, and their way back to plain layers."""
