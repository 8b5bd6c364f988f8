"""Judged claims as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from planner.claims.claim import BEYOND, POSSIBLE, SPEED, TIGHT, TIME, WEIGHTS, JudgedClaim, JudgedFigure
from planner.text.figures import bullets, columns, duration, gib, rate

_STYLES = {POSSIBLE: "green", TIGHT: "yellow", BEYOND: "red"}


def print_claims(out: Console, claims: Sequence[JudgedClaim]) -> None:
    """Print each claim with a row for each of its figures."""
    for number, one in enumerate(claims):
        if number:
            out.print()
        out.print(Text(one.claim.text, style="bold"))
        out.print(Text(f"judged on {one.gpu}{'' if one.claim.gpu else ', as it names no card'}", style="dim"))
        heads = [("stated", "name"), ("verdict", "name"), ("true", "name")]
        rows: list[list[str | Text]] = [
            [figure.figure.written, Text(figure.verdict, style=_STYLES[figure.verdict]), true_figure(figure)]
            for figure in one.figures
        ]
        columns(out, heads, rows)
        bullets(out, [f"{figure.figure.written}: {figure.reason}" for figure in one.figures])


def true_figure(one: JudgedFigure) -> str:
    """The true figure with its interval, in the unit of what was stated."""
    if one.expected is None or one.expected_low is None or one.expected_high is None:
        return "none"
    if one.figure.kind == WEIGHTS:
        return gib(one.expected)
    if one.figure.kind == SPEED:
        return f"{rate(one.expected)} tok/s ({rate(one.expected_low)} to {rate(one.expected_high)})"
    if one.figure.kind == TIME:
        return f"{duration(one.expected)} ({duration(one.expected_low)} to {duration(one.expected_high)})"
    return f"{gib(one.expected)} (at most {gib(one.expected_high)})"
