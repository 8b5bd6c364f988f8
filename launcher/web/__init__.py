"""The terminal interface in a browser of this machine."""
