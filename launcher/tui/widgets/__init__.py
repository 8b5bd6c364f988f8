"""Widgets of the terminal interface: a room a screen."""
