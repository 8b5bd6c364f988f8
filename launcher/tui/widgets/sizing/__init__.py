"""Widgets of the sizing screen, one a file."""
