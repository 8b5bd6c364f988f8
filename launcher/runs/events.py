"""Events and samples of a run: their types, the writer and the readers.

Light: no torch. One JSON object a line, each with `time` (seconds since the epoch) and `kind`. Text fields
hold what the training stack said, unescaped; whoever shows them escapes them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from launcher.runs.tail import LineTail

POLL_SECONDS = 0.2
NO_EVENT = "a line of the event file is not an event"


@dataclass(frozen=True, kw_only=True, slots=True)
class StartEvent:
    """Training begins: all optimizer steps, and the versions and device it runs on. An attempt that goes on
    from a checkpoint has that checkpoint's step as its `first_step`.
    """

    kind: ClassVar[str] = "start"
    time: float
    total_steps: int
    environment: Mapping[str, str | int | float | None]
    first_step: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEvent:
    """An attempt (launcher/runs/attempts.py) begins: what follows an end event, or a death without one, is a
    new life of the run from `from_step` on. `reason` is one of attempts.REASONS, `changes` what differs, in
    words.
    """

    kind: ClassVar[str] = "attempt"
    time: float
    number: int
    reason: str
    from_step: int
    changes: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEvent:
    """What the run does from here on ("loading", "compiling", ...: heartbeat.Beat), with a remark."""

    kind: ClassVar[str] = "stage"
    time: float
    stage: str
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogEvent:
    """Means over the steps since the last log. `tokens_per_second` counts real tokens, padding excluded;
    evaluation and saving are not in `step_seconds`. `num_tokens` is the real tokens trained on so far.
    """

    kind: ClassVar[str] = "log"
    time: float
    step: int
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    num_tokens: int | None = None
    epoch: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEvent:
    """Peaks of a phase ("load", "step", "evaluation", "save") so far, of torch's allocator on the GPU.

    Without a GPU allocated and reserved are null and `process_bytes` is the trainer's resident memory. With
    one it is what the driver shows as used, less what it showed before the trainer started; null if unknown.
    On several GPUs the figures are the largest of all, and `ranks` has each rank's three by its number.
    """

    kind: ClassVar[str] = "memory"
    time: float
    phase: str
    step: int
    allocated_bytes: int | None
    reserved_bytes: int | None
    process_bytes: int | None
    ranks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalEvent:
    """Loss on the evaluation data."""

    kind: ClassVar[str] = "eval"
    time: float
    step: int
    loss: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointEvent:
    """A checkpoint is whole on disk and its files have been read back."""

    kind: ClassVar[str] = "checkpoint"
    time: float
    step: int
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterEvent:
    """What was trained is saved under `path`, as it was after `step`: with evaluation that of the best one,
    whose loss is `evaluation_loss`, else the last.
    """

    kind: ClassVar[str] = "adapter"
    time: float
    step: int
    path: str
    evaluation_loss: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WarningEvent:
    """Something differs from what was asked or expected."""

    kind: ClassVar[str] = "warning"
    time: float
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EndEvent:
    """The run is over. `state` is one of ends.END_STATES. `room_bytes` is what other processes left of
    the GPU when memory ran out, where the driver says.
    """

    kind: ClassVar[str] = "end"
    time: float
    state: str
    message: str
    step: int
    room_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleEvent:
    """What the driver shows of the run's GPU; null where unknown. Without a GPU `process_bytes` is the
    trainer's resident memory. `host_percent` is how much of one core the trainer takes; `slowed_by` is "heat"
    or "power" where the card has lowered its clocks to protect itself. Of several GPUs it is the one that is
    used most; `gpus` has [used_bytes, process_bytes, utilization_percent] of each by its local rank.
    """

    kind: ClassVar[str] = "sample"
    time: float
    used_bytes: int | None
    total_bytes: int | None
    process_bytes: int | None
    utilization_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    host_percent: float | None = None
    slowed_by: str | None = None
    gpus: Mapping[str, Any] = field(default_factory=dict)


Event = (
    AttemptEvent
    | StageEvent
    | StartEvent
    | LogEvent
    | MemoryEvent
    | EvalEvent
    | CheckpointEvent
    | AdapterEvent
    | WarningEvent
    | EndEvent
    | SampleEvent
)
_TYPES: dict[str, type[Event]] = {
    t.kind: t
    for t in (
        AttemptEvent,
        StageEvent,
        StartEvent,
        LogEvent,
        MemoryEvent,
        EvalEvent,
        CheckpointEvent,
        AdapterEvent,
        WarningEvent,
        EndEvent,
        SampleEvent,
    )
}


def to_line(event: Event) -> str:
    """One line of strict JSON; non-finite numbers become null."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(event).items()
        if not (name in ("ranks", "gpus") and not value)
    }
    return json.dumps({"time": values.pop("time"), "kind": event.kind, **values}, allow_nan=False) + "\n"


def _accepted(annotation: str) -> frozenset[type]:
    """Types that JSON may give a field; a bool is no number."""
    if annotation.startswith("Mapping["):
        return frozenset({dict})
    kinds: dict[str, set[type]] = {"float": {float, int}, "int": {int}, "str": {str}, "None": {type(None)}}
    return frozenset().union(*(kinds[name] for name in annotation.split(" | ")))


_FIELDS = {
    name: {field.name: _accepted(str(field.type)) for field in dataclasses.fields(kind)}
    for name, kind in _TYPES.items()
}
_LARGEST = 2**63


def from_line(line: str | bytes) -> Event:
    """Read one line. Keys that this version does not know are left out.

    A line that is no event, or has a value of another type than its field's, becomes a WarningEvent, since
    one bad line must not hide the rest of a run.
    """
    try:
        values: Any = json.loads(line, parse_constant=_refuse_constant)
        kind, fields = _TYPES[values["kind"]], _FIELDS[values["kind"]]
        known = {name: value for name, value in values.items() if name in fields}
        if all(
            type(value) in fields[name] and not (type(value) is int and abs(value) > _LARGEST)
            for name, value in known.items()
        ):
            return kind(**known)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return WarningEvent(time=0.0, message=NO_EVENT)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of an event")


@dataclass(slots=True)
class EventWriter:
    """Appends events, each with one write, so that readers and a kill see whole lines.

    A full disk loses events, not the training: the number lost is told by a warning event once writing works.
    """

    path: Path
    _descriptor: int = field(default=-1, init=False)
    _lost: int = field(default=0, init=False)
    _torn: bool = field(default=False, init=False)

    def __enter__(self) -> EventWriter:
        self._torn = _ends_torn(self.path)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def write(self, event: Event) -> None:
        """Append one event."""
        if self._lost:
            lost = WarningEvent(time=time.time(), message=f"{self._lost} events could not be written")
            if not self._append(to_line(lost)):
                self._lost += 1
                return
            self._lost = 0
        if not self._append(to_line(event)):
            self._lost += 1

    def _append(self, line: str) -> bool:
        content = (("\n" if self._torn else "") + line).encode("utf-8")
        try:
            written = os.write(self._descriptor, content)
        except OSError:
            return False
        self._torn = written < len(content)
        return not self._torn


def _ends_torn(path: Path) -> bool:
    """Whether the file's last line was cut (by a kill or a full disk)."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


def append_event(path: Path, event: Event) -> None:
    """Append one event to a file that another process may be writing too; a full disk loses it."""
    with EventWriter(path) as writer:
        writer.write(event)


@dataclass(slots=True)
class EventReader:
    """Reads what was appended since the last call, a slice at most; a partial last line waits for its end."""

    path: Path
    _tail: LineTail = field(init=False)

    def __post_init__(self) -> None:
        self._tail = LineTail(self.path)

    @property
    def behind(self) -> bool:
        """Whether more is there than the last call gave."""
        return self._tail.behind

    def read_new(self) -> list[Event]:
        """Whole events that are new; an absent file has none."""
        return [from_line(line) for line in self._tail.read_new()]

    def skip_to_last(self, size_bytes: int) -> None:
        """Begin with the last `size_bytes` of what is there."""
        self._tail.skip_to_last(size_bytes)


def iter_events(path: Path) -> Iterator[Event]:
    """All whole events of a live or dead run, read in slices; a partial last line is left out."""
    reader = EventReader(path)
    while True:
        yield from reader.read_new()
        if not reader.behind:
            return


def read_events(path: Path) -> list[Event]:
    """All whole events of a live or dead run; a partial last line is left out."""
    return list(iter_events(path))


def follow(path: Path, *, until: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Yield events as they come, to the end event, or until `until()` holds and all has been read."""
    reader = EventReader(path)
    while True:
        over = until()
        for event in reader.read_new():
            yield event
            if isinstance(event, EndEvent):
                return
        if reader.behind:
            continue
        if over:
            return
        time.sleep(POLL_SECONDS)
