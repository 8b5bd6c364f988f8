"""Classes of a screen that say how large the terminal is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from textual.screen import Screen

WIDTHS: list[tuple[int, str]] = [(0, "-narrow"), (76, "-normal"), (118, "-wide")]
HEIGHTS: list[tuple[int, str]] = [(0, "-tiny"), (16, "-short"), (30, "-tall"), (40, "-high")]
"""Cells from which on a class applies, in ascending order."""


def fit_before_composing(screen: Screen[Any]) -> None:
    """Give a screen its classes while it has no children.

    Textual gives them once it has been laid out and drawn, and then styles, lays out and draws it again.
    """
    size = screen.app.size
    screen.add_class(*_applying(WIDTHS, size.width), *_applying(HEIGHTS, size.height))


def _applying(breakpoints: Sequence[tuple[int, str]], cells: int) -> Iterator[str]:
    """The last that is reached."""
    reached = [name for least, name in breakpoints if cells >= least]
    yield from reached[-1:]
