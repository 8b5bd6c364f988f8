"""Widgets of the run screen, one a file."""
