"""The terminal interface: sizing without the training stack, starting and following runs with it."""
