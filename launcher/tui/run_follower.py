"""Follow a run folder from its files alone: bounded reads in, frozen snapshots out.

Made for a worker thread.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.runs.ends import END_STATES
from launcher.runs.events import (
    AttemptEvent,
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    Event,
    LogEvent,
    MemoryEvent,
    SampleEvent,
    StageEvent,
    StartEvent,
    WarningEvent,
    from_line,
)
from launcher.runs.folder import RunFolder
from launcher.runs.locks import is_alive
from launcher.runs.report.advice import Adviser
from launcher.runs.report.facts import plan_or_none
from launcher.runs.report.series import CoalescedSeries
from launcher.runs.report.stages import STARTING, stage_text
from launcher.runs.state import TRIED_AGAIN, was_started
from launcher.runs.tail import LineTail, last_lines
from launcher.runs.training_job import TrainingJob
from planner.answers.plan import Plan
from planner.base.errors import InputError, VramwiseError
from planner.memory import MemoryBreakdown, estimate_memory
from planner.models.catalog import resolve_model
from planner.setup.run import TrainingRun

LOG_LINES = 200
RECENT_STEPS = 20
WARNINGS = 50

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What was predicted, by the run's own `plan`; where that is None, worked out now from its job."""

    memory: MemoryBreakdown
    usable_bytes: int | None
    plan: Plan | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSnapshot:
    """A run as its files tell it at one moment.

    `state` is a supervisor state, or "stopping" once a stop was asked for, or "unknown" while the files are
    still being read. `seconds_left` was right at `at`, a reading of the monotonic clock. `behind` says that
    the files hold more than has been read. `stage` is what it does now, in words, and `stage_seconds` for
    how long, at `at`; "" and null where it is over or nobody knows.
    """

    folder: RunFolder
    job: TrainingJob | None
    prediction: Prediction | None
    state: str
    message: str
    at: float
    step: int
    total_steps: int | None
    seconds_left: float | None
    stage: str
    stage_seconds: float | None
    log: LogEvent | None
    losses: Points
    eval_losses: Points
    memory: tuple[MemoryEvent, ...]
    sample: SampleEvent | None
    used_series: Points
    checkpoint: CheckpointEvent | None
    on_gpu: bool | None
    warnings: tuple[str, ...]
    warning_count: int
    log_lines: tuple[str, ...]
    event_count: int
    behind: bool

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in (*END_STATES, "killed") and not self.behind


@dataclass(slots=True)
class RunFollower:
    """Reads what is new at each poll. Not for use by two threads at once."""

    folder: RunFolder
    clock: Callable[[], float] = time.monotonic
    _events: LineTail = field(init=False)
    _samples: LineTail = field(init=False)
    _job: TrainingJob | None = field(default=None, init=False)
    _prediction: Prediction | None = field(default=None, init=False)
    _asked_for_prediction: bool = field(default=False, init=False)
    _facts: _Facts = field(init=False)
    _adviser: Adviser = field(init=False)

    def __post_init__(self) -> None:
        self._events = LineTail(self.folder.events)
        self._samples = LineTail(self.folder.samples)
        self._facts = _Facts()
        self._adviser = Adviser(plan_or_none(self.folder))

    def poll(self) -> RunSnapshot:
        """Read at most one slice of each file and say where the run stands."""
        # The process first: an end event written in between is then seen, not taken for a kill.
        alive = is_alive(self.folder)
        self._read_job()
        lines = self._events.read_new()
        if self._events.restarted:
            self._facts, self._adviser = _Facts(), Adviser(self._adviser.plan)
        now = self.clock()
        for line in lines:
            self._take(from_line(line), now)
        for line in self._samples.read_new():
            self._take(from_line(line), now)
        return self._snapshot(alive, now)

    def _snapshot(self, alive: bool, now: float) -> RunSnapshot:
        facts = self._facts
        behind = self._events.behind or self._samples.behind
        state, message = self._state(alive)
        stage, since = self._stage(state)
        return RunSnapshot(
            folder=self.folder,
            job=self._job,
            prediction=self._prediction,
            state=state,
            message=message,
            at=now,
            step=facts.step,
            total_steps=facts.total_steps,
            seconds_left=facts.seconds_left(now) if state in ("running", "unknown") else None,
            stage=stage,
            stage_seconds=since,
            log=facts.log,
            losses=facts.losses.points(),
            eval_losses=facts.eval_losses.points(),
            memory=tuple(facts.memory.values()),
            sample=facts.sample,
            used_series=facts.used.points(),
            checkpoint=facts.checkpoint,
            on_gpu=facts.on_gpu,
            warnings=tuple(facts.warnings),
            warning_count=facts.warning_count,
            log_lines=last_lines(self.folder.log("trainer"), LOG_LINES),
            event_count=facts.event_count,
            behind=behind,
        )

    def _take(self, event: Event, now: float) -> None:
        self._facts.take(event, now)
        for advice in self._adviser.take(event):
            self._facts.warn(advice.message)

    def _stage(self, state: str) -> tuple[str, float | None]:
        """What a run that is alive does, and since when; before its first event that is since it was made."""
        if state not in ("starting", "running", "stopping"):
            return "", None
        event = self._facts.stage
        if event is not None and _is_number(event.time):
            return stage_text(event), max(0.0, time.time() - event.time)
        if self._facts.event_count:
            return "", None
        try:
            return STARTING, max(0.0, time.time() - self.folder.job.stat().st_mtime)
        except OSError:
            return STARTING, None

    def _read_job(self) -> None:
        if self._job is None:
            try:
                self._job = self.folder.read_job()
            except InputError:
                return
        if not self._asked_for_prediction:
            self._asked_for_prediction = True
            self._prediction = _prediction(self.folder, self._job)

    def _state(self, alive: bool) -> tuple[str, str]:
        facts = self._facts
        again = alive and facts.end is not None and facts.end.state in TRIED_AGAIN
        if facts.end is not None and not again:
            return facts.end.state if facts.end.state in END_STATES else "failed", str(facts.end.message)
        if alive:
            if self.folder.stop.exists():
                return "stopping", "after the present step"
            return ("running" if facts.total_steps is not None else "starting"), ""
        if facts.event_count == 0 and not was_started(self.folder):
            return "created", "not started yet"
        if self._events.behind:
            return "unknown", "still reading"
        return "killed", f"the trainer is gone without a word after step {facts.step:,}"


@dataclass(slots=True)
class _Facts:
    """What the events said so far. Figures of a wrong type are left out: the file may come from anywhere."""

    step: int = 0
    total_steps: int | None = None
    log: LogEvent | None = None
    end: EndEvent | None = None
    sample: SampleEvent | None = None
    checkpoint: CheckpointEvent | None = None
    stage: StageEvent | None = None
    memory: dict[str, MemoryEvent] = field(default_factory=dict)
    losses: CoalescedSeries = field(default_factory=CoalescedSeries)
    eval_losses: CoalescedSeries = field(default_factory=CoalescedSeries)
    used: CoalescedSeries = field(default_factory=lambda: CoalescedSeries(capacity=512))
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=WARNINGS))
    warning_count: int = 0
    event_count: int = 0
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    logged_at: float = 0.0

    def take(self, event: Event, now: float) -> None:
        """Count an event in."""
        self.event_count += not isinstance(event, SampleEvent)
        match event:
            case LogEvent():
                self._take_log(event, now)
            case SampleEvent():
                self._take_sample(event)
            case MemoryEvent():
                if isinstance(event.phase, str) and len(self.memory) < 16:
                    self.memory[event.phase] = event
            case EvalEvent():
                if _is_number(event.step) and _is_number(event.loss):
                    self.eval_losses.add(event.step, event.loss)  # type: ignore[arg-type]
            case AttemptEvent():
                self._go_back_to(event)
            case StartEvent():
                self.total_steps = event.total_steps if _is_number(event.total_steps) else None
                self.end = None
            case CheckpointEvent():
                self.checkpoint = event
            case StageEvent():
                self.stage = event
            case WarningEvent():
                self.warn(str(event.message))
            case EndEvent():
                self.end = event
                self.step = event.step if _is_number(event.step) else self.step

    def _go_back_to(self, attempt: AttemptEvent) -> None:
        """Forget what this attempt does again."""
        self.end = self.stage = None
        if _is_number(attempt.from_step):
            self.step = attempt.from_step
            for series in (self.losses, self.eval_losses):
                series.drop_after(attempt.from_step)

    def warn(self, message: str) -> None:
        """Count a warning in."""
        self.warning_count += 1
        self.warnings.append(message)

    @property
    def on_gpu(self) -> bool | None:
        """Whether the trainer measures a GPU; None while it has said nothing."""
        if not self.memory:
            return None
        return any(event.allocated_bytes is not None for event in self.memory.values())

    def seconds_left(self, now: float) -> float | None:
        """Steps that remain at the recent pace, less the time since the last log."""
        if self.total_steps is None or not self.step_seconds or self.end is not None:
            return None
        # The median: one step that waited for a save says nothing about the rest.
        pace = statistics.median(self.step_seconds)
        return max(0.0, (self.total_steps - self.step) * pace - (now - self.logged_at))

    def _take_log(self, event: LogEvent, now: float) -> None:
        if not _is_number(event.step):
            return
        self.log, self.step, self.logged_at = event, event.step, now
        if _is_number(event.loss):
            self.losses.add(event.step, event.loss)  # type: ignore[arg-type]
        if _is_number(event.step_seconds):
            self.step_seconds.append(event.step_seconds)  # type: ignore[arg-type]

    def _take_sample(self, event: SampleEvent) -> None:
        self.sample = event
        used = event.process_bytes if event.used_bytes is None else event.used_bytes
        if _is_number(used) and _is_number(event.time):
            self.used.add(event.time, used)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _prediction(folder: RunFolder, job: TrainingJob) -> Prediction | None:
    """The stored plan's prediction, else one worked out from the job; None where neither is possible."""
    try:
        plan = Plan.from_dict(json.loads(folder.plan.read_text(encoding="utf-8")))
        return Prediction(memory=plan.memory, usable_bytes=plan.gpu.usable_bytes, plan=plan)
    except (OSError, ValueError, VramwiseError):
        pass
    try:
        run = TrainingRun(setup=job.setup, model=resolve_model(job.setup.model))
        memory = estimate_memory(run)
    except VramwiseError:
        return None
    return Prediction(memory=memory, usable_bytes=None)
