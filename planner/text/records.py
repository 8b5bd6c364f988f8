"""Checked records as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from planner.calibration.plausible import Beside, CheckedRecord
from planner.text.figures import bullets, columns, gib, rate


def print_checked(out: Console, records: Sequence[CheckedRecord]) -> None:
    """Each record with its verdict, its figures beside the expected ones, and what is to be seen."""
    for number, one in enumerate(records):
        if number:
            out.print()
        verdict = Text("cannot be so", style="red") if one.faults else Text("plausible", style="green")
        out.print(Text.assemble(Text(one.id, style="bold"), ": ", verdict, f"; {one.model} on {one.gpu}"))
        if one.figures:
            heads = [("", "name"), ("measured", "number"), ("expected", "number"), ("error", "number")]
            columns(out, heads, [_row(figure) for figure in one.figures])
        bullets(out, [*one.faults, *one.looks])
    faulty = sum(bool(one.faults) for one in records)
    fitted = sum(one.is_fitted and not one.faults for one in records)
    out.print()
    out.print(
        f"{len(records)} records, {faulty} of which cannot be so; {fitted} are of the kind that is fitted to."
    )


def _row(figure: Beside) -> list[str]:
    shown = rate if figure.figure == "tokens/s" else gib
    return [figure.figure, shown(figure.measured), shown(figure.expected), f"{figure.error:+.2%}"]
