"""Requests to plans: what is left open, schedule, needs, advice, comparisons."""
