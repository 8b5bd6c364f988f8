"""Tests: a package by itself, since wheels bring others of this name (gpuhunt 0.1.34 installs its own)."""
