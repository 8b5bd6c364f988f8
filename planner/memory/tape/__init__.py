"""Tapes: what a layer's operations allocate, keep and free."""
