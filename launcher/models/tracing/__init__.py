"""Tracing blocks that nobody has read: what they allocate, keep and free, recorded while they run."""
