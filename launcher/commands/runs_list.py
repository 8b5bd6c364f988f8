"""Runs as tables and as JSON: a row a run, or all that is known of one."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.runs.attempts import Attempt, read_attempts
from launcher.runs.ends import RUN_ENDS
from launcher.runs.folder import RunFolder
from launcher.runs.state import RunStatus, last_checkpoint, status
from launcher.runs.tail import last_lines
from launcher.tui.text import duration, number, plain, size
from planner.base.errors import InputError
from planner.text.figures import columns, heading, pairs, show

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,9})")
_SILENT = ("running", "finished")
"""States that need no reason."""
_LOG_LINES = 10
_NAME, _MODEL, _REASON = 60, 40, 300
"""Characters that a column shows at most."""


def as_json(name: str, run: RunStatus) -> dict[str, Any]:
    """A run of the list. Times are seconds since the epoch."""
    return {
        "run": name,
        "state": run.state,
        "alive": run.alive,
        "pid": run.pid,
        "keeper_pid": run.keeper_pid,
        "model": run.model,
        "step": run.step,
        "total_steps": run.total_steps,
        "loss": run.loss,
        "started": run.started,
        "changed": run.changed,
        "seconds_left": run.seconds_left,
        "attempts": run.attempts,
        "reason": run.message,
        "damaged": list(run.damaged),
    }


def print_table(found: Sequence[tuple[str, RunStatus]]) -> None:
    """A row a run, and under them why those stand as they do that neither run nor are finished."""
    heads = [
        ("run", "name"),
        ("age", "number"),
        ("model", "name"),
        ("state", "name"),
        ("step", "number"),
        ("loss", "number"),
        ("left", "number"),
    ]
    rows = [
        [
            plain(name, _NAME),
            _age(run),
            plain(_short_model(run.model), _MODEL),
            plain(run.state, _MODEL),
            _steps(run),
            number(run.loss),
            "-" if run.seconds_left is None else duration(run.seconds_left),
        ]
        for name, run in found
    ]
    reasons = [(plain(name, _NAME), _reason(run)) for name, run in found if _reason(run)]

    def write(out: Console) -> None:
        columns(out, heads, rows, indent=0)
        if reasons:
            heading(out, "Why")
            pairs(out, reasons)

    show(write)


def _reason(run: RunStatus) -> str:
    told = run.damaged or run.state not in _SILENT
    return plain(run.message, _REASON) if told else ""


def _age(run: RunStatus) -> str:
    since = run.started if run.started is not None else run.changed
    return "-" if since is None else duration(time.time() - since)


def _short_model(model: str | None) -> str:
    """Of a folder the last name."""
    return "-" if model is None else model.rstrip("/").split("/")[-1]


def _steps(run: RunStatus) -> str:
    return f"{run.step}/{'?' if run.total_steps is None else run.total_steps}"


def facts(folder: RunFolder) -> dict[str, Any]:
    """All that is known of a run, for JSON."""
    run = status(folder.path)
    return {
        **as_json(folder.path.name, run),
        "version": 1,
        "folder": str(folder.path),
        "adapter": str(folder.adapter) if folder.adapter.is_dir() else None,
        "checkpoints": [
            {"step": step, "path": str(path), "bytes": _bytes(path)} for step, path in _checkpoints(folder)
        ],
        "attempt_list": [attempt.to_dict() for attempt in _attempts(folder)],
        "log": list(last_lines(folder.log("trainer"), _LOG_LINES)),
    }


def print_facts(folder: RunFolder) -> None:
    """All that is known of a run, as text."""
    run = status(folder.path)
    show(lambda out: _print_facts(out, folder, run))


def _print_facts(out: Console, folder: RunFolder, run: RunStatus) -> None:
    meaning = next((end.meaning for end in RUN_ENDS if end.state == run.state), "")
    last = run.checkpoint or last_checkpoint(folder.events)
    rows = [
        ("run", plain(folder.path.name, _NAME)),
        ("state", plain(run.state, _MODEL) + (f": {meaning}" if meaning else "")),
        ("reason", plain(run.message)),
        ("folder", plain(folder.path)),
        ("started", _when(run.started)),
        ("last word", _when(run.changed)),
        ("step", _steps(run)),
        ("loss", number(run.loss)),
        ("left", "-" if run.seconds_left is None else duration(run.seconds_left)),
        ("trainer", "-" if run.pid is None else f"process {run.pid}"),
        ("keeper", "-" if run.keeper_pid is None else f"process {run.keeper_pid}"),
        *_job_rows(folder),
        ("adapter", plain(folder.adapter) if folder.adapter.is_dir() else "-"),
        ("last checkpoint", "-" if last is None else f"step {last.step:,}, {plain(last.path)}"),
    ]
    heading(out, "Run")
    pairs(out, [(label, value) for label, value in rows if value])
    _print_attempts(out, _attempts(folder))
    checkpoints = _checkpoints(folder)
    if checkpoints:
        heading(out, "Checkpoints")
        columns(
            out,
            [("step", "number"), ("size", "number"), ("folder", "name")],
            [
                [f"{step:,}", size(_bytes(path)), plain(path.relative_to(folder.path))]
                for step, path in checkpoints
            ],
        )
    lines = last_lines(folder.log("trainer"), _LOG_LINES)
    if lines:
        heading(out, f"The trainer's last lines ({plain(folder.log('trainer'))})")
        for line in lines:
            out.print(f"  {plain(line)}", markup=False, highlight=False)


def _job_rows(folder: RunFolder) -> list[tuple[str, str]]:
    try:
        job = folder.read_job()
    except InputError:
        return []
    setup = job.setup
    batch = f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps}"
    return [
        ("model", plain(setup.model)),
        ("method", f"{setup.method}, {setup.max_length:,} tokens, batch {batch}"),
        ("data", plain(job.data_path)),
    ]


def _print_attempts(out: Console, attempts: Sequence[Attempt]) -> None:
    if not attempts:
        return
    heading(out, "Attempts")
    rows = [
        [str(one.number), one.reason, f"{one.from_step:,}", plain(one.changes, _REASON)] for one in attempts
    ]
    columns(out, [("number", "number"), ("why", "name"), ("from step", "number"), ("changes", "text")], rows)


def _attempts(folder: RunFolder) -> list[Attempt]:
    try:
        return read_attempts(folder.attempts)
    except InputError:
        return []


def _checkpoints(folder: RunFolder) -> list[tuple[int, Path]]:
    """Checkpoints by step."""
    try:
        names = [(path, _CHECKPOINT.fullmatch(path.name)) for path in folder.checkpoints.iterdir()]
    except OSError:
        return []
    return sorted((int(found[1]), path) for path, found in names if found is not None)


def _bytes(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def _when(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "-"
