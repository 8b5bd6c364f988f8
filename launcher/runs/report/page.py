"""RunReport as Markdown: what people read, with everything that came from outside escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from launcher.runs.report.facts import PhaseFigures, RunReport
from planner.text.figures import duration, figure, rate

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~$&])")
MOST_ROWS = 30
"""Rows of a table of evaluations; the JSON has all."""


def markdown(report: RunReport, picture: str | None) -> str:
    """The page; `picture` is the name of the loss curve's file beside it."""
    parts = [f"# {escaped(report.run)}: {escaped(report.state)}", *_summary(report)]
    if picture is not None:
        parts += [f"![Loss by step]({picture})"]
    parts += [*_evaluations(report), *_memory(report), *_lists(report), *_attempts(report), *_next(report)]
    return "\n\n".join(parts) + "\n"


def summary_rows(report: RunReport) -> list[tuple[str, str]]:
    """The facts that come first, as (name, text) pairs: those of the page and of the terminal."""
    total = "" if report.total_steps is None else f" of {report.total_steps:,}"
    tokens = "" if report.tokens is None else f", {report.tokens:,} tokens"
    rows = [("ended" if report.reason else "", report.reason)]
    rows.append(("trained", f"{report.steps:,}{total} steps{tokens}, {duration(report.seconds / 3600)}"))
    if report.first_loss is not None:
        lowest = f", lowest {number(report.lowest_loss)} at step {report.lowest_loss_step}"
        rows.append(("loss", f"{number(report.first_loss)} first, {number(report.last_loss)} last{lowest}"))
    best = report.best_evaluation
    if best is not None:
        last = report.evaluations[-1]
        text = f"{number(best.loss)} at step {best.step}, the best of {len(report.evaluations)}"
        rows.append(("evaluation", text if last == best else f"{text}; {number(last.loss)} at the last"))
    if report.tokens_per_second is not None:
        said = report.predicted_tokens_per_second
        forecast = "" if said is None else f"{rate(said)} forecast for {report.gpu}, "
        rows.append(("tokens/s", f"{forecast}{rate(report.tokens_per_second)} measured"))
    if report.adapter is not None:
        rows.append(("adapter", f"{report.adapter}{_of_step(report)}"))
    if report.checkpoints:
        steps = ", ".join(str(one.step) for one in report.checkpoints)
        rows.append(("checkpoints", f"of step {steps}"))
    return [(name, text) for name, text in rows if text]


def number(value: float | None) -> str:
    """A loss, to four digits."""
    return "?" if value is None else f"{value:.4g}"


def escaped(text: object) -> str:
    """Foreign text on one line, with no control character and nothing that Markdown or HTML would obey."""
    return (
        _SPECIAL.sub(r"\\\1", visible(text))
        .replace("\\<", "&lt;")
        .replace("\\>", "&gt;")
        .replace("\\&", "&amp;")
    )


def visible(text: object) -> str:
    """Foreign text on one line: line breaks are blanks, other control characters visible escapes."""
    joined = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


def _of_step(report: RunReport) -> str:
    if report.adapter_step is None:
        return ""
    best = report.best_evaluation
    if best is not None and best.step == report.adapter_step:
        return f", of step {report.adapter_step}: the best evaluation"
    return f", of step {report.adapter_step}"


def _summary(report: RunReport) -> Iterator[str]:
    if report.meaning:
        yield escaped(report.meaning[0].upper() + report.meaning[1:]) + "."
    rows = [
        *summary_rows(report),
        ("began", report.started or ""),
        ("model", f"{report.model} from {report.model_source}"),
        ("data", str(report.data)),
        ("evaluated on", report.evaluation_data or ""),
        ("method", _method(report)),
        ("planned for", report.gpu or ""),
        ("trained on", report.device or ""),
    ]
    yield _table(("", ""), [(name, text) for name, text in rows if text])


def _method(report: RunReport) -> str:
    setup = report.setup or {}
    rank = f", rank {setup['lora_r']}" if report.method != "full" else ""
    batch = f"{setup['per_device_train_batch_size']} x {setup['gradient_accumulation_steps']} accumulated"
    return f"{report.method}{rank}, {setup['max_length']:,} tokens, {batch}, {setup['optim']}"


def _evaluations(report: RunReport) -> Iterator[str]:
    if report.evaluations:
        left_out = len(report.evaluations) - MOST_ROWS
        yield "## Evaluations"
        if left_out > 0:
            yield f"The last {MOST_ROWS} of {len(report.evaluations)}."
        shown = report.evaluations[-MOST_ROWS:]
        yield _table(("step", "loss"), [(f"{one.step:,}", number(one.loss)) for one in shown])


def _memory(report: RunReport) -> Iterator[str]:
    if not report.memory:
        return
    yield "## Memory, predicted beside measured"
    yield _table(
        ("phase", "", "predicted GiB", "measured", "error"),
        [(one.phase, one.what, figure(one.predicted_bytes), *measured(one)) for one in report.memory],
    )
    if not any(one.comparable for one in report.memory):
        yield NOT_COMPARABLE


NOT_COMPARABLE = (
    "The prediction is for the GPU; measured is the resident memory of a process on the CPU, "
    "so the two cannot agree."
)


def measured(figures: PhaseFigures) -> tuple[str, str]:
    """What was measured, and the error."""
    if figures.measured_bytes is None:
        return "not measured", ""
    return figure(figures.measured_bytes), "" if figures.error is None else f"{figures.error:+.1%}"


def _lists(report: RunReport) -> Iterator[str]:
    lists = (("Advice", report.advice), ("Data", report.data_notes), ("Warnings", report.warnings))
    for title, items in lists:
        if items:
            yield f"## {title}"
            yield "\n".join(f"- {escaped(item)}" for item in items)


def _attempts(report: RunReport) -> Iterator[str]:
    if len(report.attempts) > 1:
        yield "## Attempts"
        rows = [
            (
                str(one.number),
                one.reason,
                f"{one.from_step:,}",
                duration(one.seconds / 3600),
                one.end_state or "",
                one.changes,
            )
            for one in report.attempts
        ]
        yield _table(("", "why", "from step", "lived", "ended", "changed"), rows)


def _next(report: RunReport) -> Iterator[str]:
    if report.next_steps:
        yield "## How to go on"
        for one in report.next_steps:
            # An indented block holds whatever a name holds; it ends with the line.
            yield f"{escaped(one.what)}:\n\n    {visible(one.command)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
