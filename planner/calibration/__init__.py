"""Measured runs to coefficients, rates, intervals and held-out errors."""
