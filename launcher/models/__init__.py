"""Describing models from the installed transformers."""
