"""Traced blocks, played onto a tape as recipes are."""
