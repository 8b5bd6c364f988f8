"""Where a run stands, from its files and locks: the head and the end of the events, never all of them.

What is damaged is named, and what it would have said is taken from the other files. Light: no torch.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from launcher.runs.attempts import read_attempts
from launcher.runs.events import (
    AttemptEvent,
    CheckpointEvent,
    EndEvent,
    Event,
    LogEvent,
    StartEvent,
    WarningEvent,
    from_line,
)
from launcher.runs.folder import RunFolder
from launcher.runs.heartbeat import read_beat
from launcher.runs.locks import holder
from launcher.runs.tail import BLOCK_BYTES, last_line_with, lines_from_the_end
from planner.base.errors import InputError

RECENT_LINES = 2000
"""Lines at the end of the events that are looked at: of a run that logs each step, its last half hour."""
RECENT_STEPS = 20
"""Log events whose median is the pace that the time left is worked out with."""
TRIED_AGAIN = ("hang", "oom")
"""Ends that another attempt may follow, while the keeper lives."""
NOBODY_KNOWS = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """Where a run stands.

    `state` is "created" (never started), "starting" (no event of training yet), "running", one of the end
    states (ends.RUN_ENDS), "killed" also where nobody could write an end, or "unknown" where the events are
    lost. `alive` says that the trainer, or the keeper that may start another, exists; `pid` is the trainer's
    where it can be known. `started` and `changed` are seconds since the epoch. `seconds_left` is at the pace
    of the last steps. `damaged` names files that cannot be read.
    """

    state: str
    step: int
    total_steps: int | None
    message: str
    alive: bool
    pid: int | None = None
    keeper_pid: int | None = None
    model: str | None = None
    loss: float | None = None
    checkpoint: CheckpointEvent | None = None
    attempts: int = 0
    started: float | None = None
    changed: float | None = None
    seconds_left: float | None = None
    damaged: tuple[str, ...] = ()

    @property
    def over(self) -> bool:
        """Whether nothing more will happen: started, and trainer and keeper are gone."""
        return self.state != "created" and not self.alive


def status(run_dir: Path) -> RunStatus:
    """Where the run stands.

    Raises:
        InputError: the folder holds nothing of a run.
    """
    folder = RunFolder(run_dir)
    # The processes first: an end event written in between is then seen, not taken for a kill.
    trainer, keeper = (holder(folder.lock_file(process)) for process in ("trainer", "keeper"))
    if not is_run(run_dir):
        raise InputError(f"{run_dir}: not a run folder (no job.json)")
    damaged, model = _read_job(folder)
    try:
        attempts = len(read_attempts(folder.attempts))
    except InputError:
        attempts = 0
        damaged.append(folder.attempts.name)
    recent = read_recent(folder.events, attempts=attempts)
    alive = trainer is not None or keeper is not None
    state, message, step = _state(folder, recent, alive=alive, attempts=attempts)
    if damaged:
        message = "; ".join(text for text in (f"damaged: {', '.join(damaged)}", message) if text)
    return RunStatus(
        state=state,
        step=step,
        total_steps=recent.total_steps,
        message=message,
        alive=alive,
        pid=None if trainer is None else trainer.pid,
        keeper_pid=None if keeper is None else keeper.pid,
        model=model,
        loss=next((log.loss for log in recent.logs if log.loss is not None), None),
        checkpoint=recent.checkpoint,
        attempts=attempts,
        started=recent.started,
        changed=_changed(folder),
        seconds_left=recent.seconds_left() if state == "running" else None,
        damaged=tuple(damaged),
    )


def is_run(path: Path) -> bool:
    """Whether a folder is one of a run, even where a file of it is lost."""
    folder = RunFolder(path)
    known = (folder.job, folder.events, folder.plan, folder.attempts, folder.lock_file("keeper"))
    return any(one.is_file() for one in known)


def was_started(folder: RunFolder) -> bool:
    """Whether a process of the run has ever been started."""
    traces = (folder.attempts, folder.lock_file("trainer"), folder.lock_file("keeper"), folder.events)
    return any(one.is_file() for one in traces)


@dataclass(slots=True)
class Recent:
    """What the head and the last lines of the events say of the present attempt."""

    total_steps: int | None = None
    started: float | None = None
    first_step: int = 0
    training: bool = False
    lines: int = 0
    end: EndEvent | None = None
    checkpoint: CheckpointEvent | None = None
    warning: WarningEvent | None = None
    logs: list[LogEvent] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that is known to be done."""
        return self.logs[0].step if self.logs else self.first_step

    def seconds_left(self) -> float | None:
        """Steps that remain, at the pace of the last ones, less the time since the last log."""
        paces = [log.step_seconds for log in self.logs if log.step_seconds is not None]
        if self.total_steps is None or not paces:
            return None
        since = max(0.0, time.time() - self.logs[0].time)
        return max(0.0, (self.total_steps - self.step) * statistics.median(paces) - since)


def read_recent(path: Path, *, attempts: int = 1) -> Recent:
    """Read the head and the last lines of an event file, whatever its length."""
    recent = Recent()
    for line in islice(lines_from_the_end(path), RECENT_LINES):
        recent.lines += 1
        event = from_line(line)
        if isinstance(event, AttemptEvent):
            recent.first_step = recent.first_step or event.from_step
            break
        _take(recent, event)
        if isinstance(event, StartEvent):
            break
    first = next((event for event in _head(path) if event.time), None)
    recent.started = None if first is None else first.time
    if recent.total_steps is None and (recent.logs or recent.end is not None):
        recent.total_steps = _total_steps(path, attempts)
        recent.training = recent.total_steps is not None or bool(recent.logs)
    return recent


def last_checkpoint(path: Path) -> CheckpointEvent | None:
    """The last checkpoint that an event file names, however far back."""
    line = last_line_with(path, b'"kind": "checkpoint"')
    event = None if line is None else from_line(line)
    return event if isinstance(event, CheckpointEvent) else None


def _take(recent: Recent, event: Event) -> None:
    """Count an event in that stands before those seen so far."""
    match event:
        case EndEvent():
            recent.end = recent.end or event
        case LogEvent():
            if len(recent.logs) < RECENT_STEPS:
                recent.logs.append(event)
        case CheckpointEvent():
            recent.checkpoint = recent.checkpoint or event
        case WarningEvent():
            recent.warning = recent.warning or event
        case StartEvent():
            recent.total_steps, recent.first_step, recent.training = event.total_steps, event.first_step, True
        case _:
            pass


def _head(path: Path) -> Iterator[Event]:
    """Events of the file's first block."""
    try:
        with path.open("rb") as file:
            lines = file.read(BLOCK_BYTES).split(b"\n")
    except OSError:
        return
    yield from (from_line(line) for line in lines[:-1] if line.strip())


def _total_steps(path: Path, attempts: int) -> int | None:
    """All steps, as the last start event says: of a single attempt it stands at the head."""
    starts = [event for event in _head(path) if isinstance(event, StartEvent)]
    if starts and attempts <= 1:
        return starts[-1].total_steps
    line = last_line_with(path, b'"kind": "start"')
    event = None if line is None else from_line(line)
    return event.total_steps if isinstance(event, StartEvent) else None


def _state(folder: RunFolder, recent: Recent, *, alive: bool, attempts: int) -> tuple[str, str, int]:
    """State, message and step."""
    step = recent.step
    warning = "" if recent.warning is None else recent.warning.message
    if recent.end is not None:
        if alive and recent.end.state in TRIED_AGAIN:
            return "starting", recent.end.message, recent.end.step
        return recent.end.state, recent.end.message, recent.end.step
    training = recent.training
    if recent.lines == 0 and (beat := read_beat(folder.heartbeat)) is not None:
        # Without events the heartbeat still knows.
        training, step = beat.stage != "loading", beat.step
    if alive:
        return ("running" if training else "starting"), warning, step
    if not attempts and not was_started(folder):
        return "created", "", 0
    if recent.lines == 0 and folder.adapter.is_dir():
        return NOBODY_KNOWS, "the events are lost; an adapter is there", step
    last = recent.checkpoint or last_checkpoint(folder.events)
    kept = "no checkpoint was written" if last is None else f"the last checkpoint is of step {last.step}"
    return "killed", f"the trainer is gone without a word after step {step}; {kept}", step


def _read_job(folder: RunFolder) -> tuple[list[str], str | None]:
    """Names of the files that cannot be read, and the model that is trained."""
    damaged, model = [], None
    try:
        model = folder.read_job().setup.model
    except InputError:
        damaged.append(folder.job.name)
    try:
        if not isinstance(json.loads(folder.plan.read_bytes()), dict):
            damaged.append(folder.plan.name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError):
        damaged.append(folder.plan.name)
    return damaged, model


def _changed(folder: RunFolder) -> float | None:
    """When the run last said something, or was made."""
    for path in (folder.events, folder.job, folder.path):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return None
