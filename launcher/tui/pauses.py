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
    to 100 ms (measured; docs.python.org/3/library/gc.html#gc.freeze). What stays for want of one is little,
    cycles of closed screens, but that of a run that is followed for hours is not: collect_idle.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, FULL_AFTER)


def collect_idle() -> None:
    """Collect all once, and leave what stays out of later collections: for a moment without keys.

    Each poll of a run leaves a cycle of a worker, its task and its context (textual/worker.py), 6 KiB: 90 MB
    an hour. Since the last call few objects were made, so that this takes 10 ms, at first 60 to 120.
    """
    if gc.get_threshold()[2] == FULL_AFTER:
        gc.collect()
        gc.freeze()
