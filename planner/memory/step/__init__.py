"""Whole steps: the timeline of live bytes, and the replay through an allocator."""
