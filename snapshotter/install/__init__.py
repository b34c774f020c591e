"""`nydusctl node install|uninstall`: what makes a machine with containerd a node with this snapshotter, and back."""
