"""Compiled layers: what they keep, their two graphs."""
