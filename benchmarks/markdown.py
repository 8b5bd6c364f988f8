"""Errors and tables as Markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence

WIDTH = 118


def size(share: float, digits: int) -> str:
    """A share in percent, without its sign."""
    shown = f"{100 * abs(share):.{digits}f}"
    return f"under {10**-digits:.{digits}f}" if share and not float(shown) else shown


def median_and_worst(errors: Sequence[float], digits: int) -> str:
    """The median's size and the worst error in percent; of a single run its error, of none nothing."""
    if not errors:
        return ""
    worst = f"{100 * max(errors, key=abs):+.2f}"
    return worst if len(errors) == 1 else f"{size(statistics.median(map(abs, errors)), digits)}, {worst}"


def median_and_bias(errors: Sequence[float], digits: int) -> str:
    """The median's size and the mean."""
    return f"{size(statistics.median(map(abs, errors)), digits)}%, {statistics.fmean(errors):+.2%}"


def wrapped(text: str) -> str:
    """Lines of at most WIDTH characters."""
    return "\n".join([*textwrap.wrap(text, WIDTH), ""])


def filled(old: str, cells: Callable[[str], list[str]]) -> str:
    """A Markdown table with the last cells of its rows written anew, by what the first says."""
    lines = old.splitlines()
    for index in range(2, len(lines)):
        words = [cell.strip() for cell in lines[index].strip().strip("|").split("|")]
        new = cells(words[0])
        words = [*words[: lines[0].count("|") - 1 - len(new)], *new]
        lines[index] = "| " + " | ".join(words) + " |"
    return "\n".join([*lines, ""])
