"""Torch's allocators, replayed."""
