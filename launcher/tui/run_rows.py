"""A row a run for the table of runs; made for a worker thread, what is over is read once."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.runs.events import EvalEvent, LogEvent, MemoryEvent, from_line
from launcher.runs.folder import RunFolder
from launcher.runs.report.facts import plan_or_none
from launcher.runs.state import RECENT_LINES, RunStatus, status
from launcher.runs.tail import lines_from_the_end
from launcher.tui.run_facts import is_number
from planner.base.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """What the table says of a run; null where nobody knows. Peaks are of the process as the driver shows it,
    `seconds` from the first event to the last, `started` since the epoch.
    """

    folder: RunFolder
    name: str
    model: str | None
    data: str | None
    method: str | None
    status: RunStatus
    loss: float | None
    evaluation: float | None
    tokens_per_second: float | None
    peak_bytes: int | None
    planned_peak_bytes: int | None
    seconds: float | None

    @property
    def started(self) -> float | None:
        """When it was started, in seconds since the epoch."""
        return self.status.started


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, what it is sorted by (null last), and its width for a number, 0 for text."""

    key: str
    heading: str
    value: Callable[[RunRow], Any]
    largest_first: bool = False


COLUMNS = (
    Column("run", "run", lambda row: row.name.lower()),
    Column("state", "state", lambda row: row.status.state),
    Column("steps", "steps", lambda row: row.status.step, largest_first=True),
    Column("loss", "loss", lambda row: row.loss),
    Column("evaluation", "eval", lambda row: row.evaluation),
    Column("speed", "tokens/s", lambda row: row.tokens_per_second, largest_first=True),
    Column("peak", "peak (planned)", lambda row: row.peak_bytes, largest_first=True),
    Column("model", "model", lambda row: row.model),
    Column("method", "method", lambda row: row.method),
    Column("data", "data", lambda row: row.data),
    Column("started", "started", lambda row: row.started, largest_first=True),
    Column("took", "took", lambda row: row.seconds, largest_first=True),
)
"""The table's columns; those that tell most stand where a narrow terminal has them."""


def sorted_rows(rows: list[RunRow], column: Column, *, turned: bool) -> list[RunRow]:
    """Rows by a column, what is not known last."""

    def known(row: RunRow) -> bool:
        value = column.value(row)
        return value is not None and not (isinstance(value, float) and math.isnan(value))

    there = sorted(filter(known, rows), key=column.value, reverse=column.largest_first != turned)
    return there + [row for row in rows if not known(row)]


class RowReader:
    """Makes rows; one of a run that is over is made again only where its files have changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], RunRow]] = {}

    def read(self, folder: RunFolder) -> RunRow | None:
        """The row of a run; None of what is none, or is gone by now."""
        key = _state_of(folder)
        before = self._known.get(folder.path)
        if before is not None and before[0] == key and before[1].status.over:
            return before[1]
        try:
            row = _row(folder)
        except InputError:
            return None
        self._known[folder.path] = key, row
        return row


def _state_of(folder: RunFolder) -> tuple[int, ...]:
    found = []
    for path in (folder.events, folder.report, folder.job):
        try:
            one = path.stat()
            found += [one.st_size, one.st_mtime_ns]
        except OSError:
            found += [0, 0]
    return tuple(found)


def _row(folder: RunFolder) -> RunRow:
    now = status(folder.path)
    job, plan = _job_or_none(folder), plan_or_none(folder)
    evaluation, rates, peak, last = _recent(folder)
    report = _report(folder) if now.over else {}
    told_rate, told_seconds = report.get("tokens_per_second"), report.get("seconds")
    seconds = None if now.started is None or last is None else max(0.0, last - now.started)
    return RunRow(
        folder=folder,
        name=folder.path.name,
        model=now.model,
        data=None if job is None else job.data_path,
        method=None if job is None else job.setup.method,
        status=now,
        loss=now.loss,
        evaluation=evaluation,
        tokens_per_second=told_rate if is_number(told_rate) else rates,
        peak_bytes=_reported_peak(report) or peak,
        planned_peak_bytes=None if plan is None else plan.memory.peak_bytes,
        seconds=told_seconds if is_number(told_seconds) else seconds,
    )


def _job_or_none(folder: RunFolder) -> Any:
    try:
        return folder.read_job()
    except InputError:
        return None


def _recent(folder: RunFolder) -> tuple[float | None, float | None, int | None, float | None]:
    """Last evaluation, median rate and highest peak of what the last lines of the events say, and when the
    last of them was.
    """
    evaluation: float | None = None
    last: float | None = None
    rates: list[float] = []
    peaks: list[int] = []
    for line in islice(lines_from_the_end(folder.events), RECENT_LINES):
        event = from_line(line)
        last = last or event.time or None
        match event:
            case EvalEvent(loss=loss) if evaluation is None:
                evaluation = loss
            case LogEvent(tokens_per_second=rate) if rate is not None:
                rates.append(rate)
            # On the CPU it is the trainer's memory of the host, which no plan is for.
            case MemoryEvent(process_bytes=held, allocated_bytes=int()) if held is not None:
                peaks.append(held)
            case _:
                pass
    return evaluation, statistics.median(rates) if rates else None, max(peaks, default=None), last


def _report(folder: RunFolder) -> dict[str, Any]:
    """The report as written at the run's end; nothing of one that is damaged or not there."""
    try:
        found = json.loads(folder.report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _reported_peak(report: dict[str, Any]) -> int | None:
    rows = report.get("memory")
    found = [
        row["measured_bytes"]
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
        and row.get("what") == "driver"
        and isinstance(row.get("measured_bytes"), int)
    ]
    return max(found, default=None)
