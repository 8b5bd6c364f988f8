"""Keep Python's garbage collector from holding up the screen between a key and its answer."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 20_000
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
