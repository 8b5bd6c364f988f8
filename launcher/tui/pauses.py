"""Keep Python's garbage collector from holding up the screen between a key and its answer."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 2_000
"""New objects between two collections of the youngest, ten of which are followed by one of all that they
left: the longest pauses of the latter are then 9 ms (15 ms with 5,000, 33 to 52 with 20,000), and all
together take as long (benchmarks/tui_latency.py with gc.callbacks)."""
FULL_AFTER = 1_000


def shorten_pauses() -> None:
    """Leave what is loaded out of later collections, and go through the rest seldom.

    A full collection looks at 100,000 objects and more, widgets and estimates, and stops all threads for 50
    to 100 ms (measured; docs.python.org/3/library/gc.html#gc.freeze). What stays for want of one is little:
    cycles of closed screens.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, FULL_AFTER)
