"""A decoder layer's programs, and the layers of one kind as groups."""
