"""A person's own measured runs, each figure beside what was predicted; made for a worker thread."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planner.base.data_files import user_data_dir
from planner.base.errors import InputError, VramwiseError
from planner.calibration.records import RunRecord, read_records
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import resolve_model
from planner.throughput.roofline import forecast

MOST = 500
"""Runs that are shown: the last ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnRun:
    """A run: the peak of its steps in bytes as the driver showed it, else as torch reserved it, and tokens a
    second. `predicted_bytes` was told before the run; `predicted_rate` is what is forecast for it now. Null:
    not measured, or not told.
    """

    id: str
    created: str
    source: str
    model: str
    method: str
    gpu: str
    outcome: str
    measured_bytes: int | None
    predicted_bytes: int | None
    measured_rate: float | None
    predicted_rate: float | None

    @property
    def memory_error(self) -> float | None:
        """Predicted over measured, less one."""
        return _error(self.predicted_bytes, self.measured_bytes)

    @property
    def speed_error(self) -> float | None:
        """Predicted over measured, less one."""
        return _error(self.predicted_rate, self.measured_rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """How many runs have a figure's error, the median of its size, and the worst with its sign."""

    runs: int
    median: float
    worst: float


def own_runs(runs_root: Path) -> tuple[tuple[OwnRun, ...], tuple[str, ...]]:
    """All own runs, the newest first, and what could not be read, in words."""
    found: dict[str, RunRecord] = {}
    unread: list[str] = []
    for path in sorted((user_data_dir() / "runs").glob("*.jsonl")):
        try:
            found |= {record.id: record for record in read_records(path)}
        except (InputError, OSError) as error:
            unread.append(str(error))
    for record in _in_folders(runs_root):
        found.setdefault(record.id, record)
    newest = sorted(found.values(), key=lambda record: record.created, reverse=True)[:MOST]
    return tuple(map(_row, newest)), tuple(unread)


def errors_of(values: list[float | None]) -> Errors | None:
    """The summary of errors, those that are not known left out; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Errors(runs=len(known), median=statistics.median(map(abs, known)), worst=max(known, key=abs))


def _in_folders(root: Path) -> Iterator[RunRecord]:
    """Records of run folders, which may have come from another machine; what is none is left out."""
    for path in root.glob("*/record.json"):
        with contextlib.suppress(InputError, OSError, ValueError):
            values = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(values, dict):
                yield RunRecord.from_dict(values)


def _row(record: RunRecord) -> OwnRun:
    step, told = record.phase("step"), record.predicted
    by_driver = step is not None and step.process_bytes is not None and record.isolated
    measured = None if step is None else (step.process_bytes if by_driver else step.reserved_bytes)
    predicted = None if told is None else (told.process_bytes if by_driver else told.reserved_bytes)
    rate = record.tokens_per_second
    return OwnRun(
        id=record.id,
        created=record.created,
        source=record.source,
        model=record.setup.model,
        method=record.setup.method,
        gpu=record.environment.gpu_id,
        outcome=record.outcome,
        measured_bytes=measured,
        predicted_bytes=predicted,
        measured_rate=rate,
        predicted_rate=None if rate is None else _forecast(record),
    )


def _forecast(record: RunRecord) -> float | None:
    """Tokens a second as forecast now; None for a card or a model that nobody here knows."""
    try:
        gpu, model = (
            gpu_catalog().get(record.environment.gpu_id),
            resolve_model(record.setup.model, images=record.setup.image_patches > 0),
        )
        found = forecast(record.run(model), gpu)
    except VramwiseError:
        return None
    return None if found is None else found.tokens_per_second


def _error(predicted: float | None, measured: float | None) -> float | None:
    return None if not predicted or not measured else predicted / measured - 1
