"""Import large libraries without Python's garbage collector going through them again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect nothing inside, and leave what is there afterwards out of later collections.

    Importing torch, transformers, PEFT and TRL makes 900,000 objects, nearly all of which stay: to look for
    garbage among them takes 1 to 1.5 s of 7 (docs.python.org/3/library/gc.html#gc.freeze).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
        gc.freeze()
