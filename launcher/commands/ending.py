"""The end of a run in the terminal: the facts of its report, predicted beside measured, how to go on."""

from __future__ import annotations

from rich.console import Console

from launcher.runs.report.facts import RunReport
from launcher.runs.report.page import NOT_COMPARABLE, measured, summary_rows, visible
from planner.text.figures import bullets, columns, figure, footnote, heading, pairs

MOST_NOTES = 12


def print_report(out: Console, report: RunReport, page: str | None) -> None:
    """Print it; `page` is where the whole of it is."""
    heading(out, f"{visible(report.state).capitalize()} after {report.steps} steps")
    rows = [(name, visible(text)) for name, text in summary_rows(report)]
    pairs(out, [*rows, *([] if page is None else [("report", visible(page))])])
    if report.memory:
        heading(out, "Predicted beside measured")
        _print_memory(out, report)
    notes = [*report.advice, *report.data_notes, *report.warnings]
    if notes:
        heading(out, "To know")
        left_out = len(notes) - MOST_NOTES
        more = [f"{left_out} more are in the report"] if left_out > 0 else []
        bullets(out, [*map(visible, notes[:MOST_NOTES]), *more])
    if report.next_steps:
        heading(out, "Next")
        for one in report.next_steps:
            footnote(out, f"  {one.what}")
            # Not wrapped: a line to be copied.
            out.print(f"    {visible(one.command)}", soft_wrap=True, markup=False)


def _print_memory(out: Console, report: RunReport) -> None:
    rows = [[one.phase, one.what, figure(one.predicted_bytes), *measured(one)] for one in report.memory]
    heads = [("phase", "name"), ("", "name"), ("predicted GiB", "number"), ("measured", "number")]
    columns(out, [*heads, ("error", "number")], rows)
    seen = [one for one in report.memory if one.measured_bytes is not None]
    if seen and not any(one.comparable for one in seen):
        out.print()
        footnote(out, NOT_COMPARABLE)
