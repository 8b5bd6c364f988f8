"""Follow a run folder from its files alone: bounded reads in, frozen snapshots out.

Made for a worker thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.runs.ends import END_STATES
from launcher.runs.events import CheckpointEvent, Event, LogEvent, MemoryEvent, SampleEvent, from_line
from launcher.runs.folder import RunFolder
from launcher.runs.locks import is_alive
from launcher.runs.report.advice import Adviser
from launcher.runs.report.facts import plan_or_none
from launcher.runs.report.stages import STARTING, stage_text
from launcher.runs.state import TRIED_AGAIN, was_started
from launcher.runs.tail import ThinnedTail, last_lines
from launcher.runs.training_job import TrainingJob
from launcher.tui.run_facts import Curves, Left, Points, RunFacts, StageSpan, is_number
from planner.answers.plan import Plan
from planner.base.errors import InputError, VramwiseError
from planner.memory import MemoryBreakdown, estimate_memory
from planner.models.catalog import resolve_model
from planner.setup.run import TrainingRun

LOG_LINES = 2000
LOG_BYTES = 2**18
"""Of the trainer's output, what is read and searched."""
CATCH_UP_SECONDS = 1.0
"""Of a long file that is thinned, slices are read for so long before a snapshot is shown."""


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
    still being read. `left` was right at `at`, a reading of the monotonic clock. `behind` says that
    the files hold more than has been read. `stage` is what it does now, in words, and `stage_seconds` for
    how long, at `at`; "" and null where it is over or nobody knows. `lines` is the run's own log, `log_lines`
    the trainer's output; `seconds` is from the first event to the last. `tokens_per_second` is the median
    rate from the third step on, `best_evaluation` the lowest loss and its step.
    """

    folder: RunFolder
    job: TrainingJob | None
    prediction: Prediction | None
    state: str
    message: str
    at: float
    step: int
    total_steps: int | None
    left: Left | None
    stage: str
    stage_seconds: float | None
    stages: tuple[StageSpan, ...]
    seconds: float | None
    log: LogEvent | None
    first_loss: float | None
    best_evaluation: tuple[float, int] | None
    tokens_per_second: float | None
    adapter_step: int | None
    curves: Curves
    memory: tuple[MemoryEvent, ...]
    sample: SampleEvent | None
    checkpoint: CheckpointEvent | None
    on_gpu: bool | None
    warnings: tuple[str, ...]
    warning_count: int
    lines: tuple[str, ...]
    log_lines: tuple[str, ...]
    event_count: int
    behind: bool

    @property
    def losses(self) -> Points:
        """The loss by step."""
        return self.curves.losses

    @property
    def eval_losses(self) -> Points:
        """The loss on evaluation data by step."""
        return self.curves.eval_losses

    @property
    def seconds_left(self) -> float | None:
        """Seconds that remain at the pace of the recent steps."""
        return None if self.left is None else self.left.seconds

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in (*END_STATES, "killed") and not self.behind


@dataclass(slots=True)
class RunFollower:
    """Reads what is new at each poll. Not for use by two threads at once."""

    folder: RunFolder
    clock: Callable[[], float] = time.monotonic
    _events: ThinnedTail = field(init=False)
    _samples: ThinnedTail = field(init=False)
    _job: TrainingJob | None = field(default=None, init=False)
    _prediction: Prediction | None = field(default=None, init=False)
    _asked_for_prediction: bool = field(default=False, init=False)
    _facts: RunFacts = field(init=False)
    _adviser: Adviser = field(init=False)
    _output_key: tuple[int, int, int] | None = field(default=None, init=False)
    _output_lines: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self._events = ThinnedTail(self.folder.events, LogEvent.kind)
        self._samples = ThinnedTail(self.folder.samples, SampleEvent.kind)
        self._facts = RunFacts()
        self._adviser = Adviser(plan_or_none(self.folder))

    def poll(self) -> RunSnapshot:
        """Read at most one slice of each file, of long ones as many as a moment allows, and say where the run
        stands.
        """
        # The process first: an end event written in between is then seen, not taken for a kill.
        alive = is_alive(self.folder)
        self._read_job()
        until = time.monotonic() + CATCH_UP_SECONDS
        self._read_events()
        self._read_samples()
        while (self._events.thinning or self._samples.thinning) and time.monotonic() < until:
            if self._events.thinning:
                self._read_events()
            if self._samples.thinning:
                self._read_samples()
        return self._snapshot(alive, self.clock())

    def _read_events(self) -> None:
        before = self._events.left_out
        lines = self._events.read_new()
        if self._events.tail.restarted:
            self._facts, self._adviser, before = RunFacts(), Adviser(self._adviser.plan), 0
        if self._events.left_out and not before:
            self._take_reported_advice()
        self._facts.event_count += self._events.left_out - before
        now = self.clock()
        for line in lines:
            self._take(from_line(line), now)

    def _read_samples(self) -> None:
        samples, now = self._samples.read_new(), self.clock()
        # A minute of samples means little once most are left out.
        asked = not self._samples.thinning
        for line in samples:
            self._take(from_line(line), now, asked=asked)

    def _take_reported_advice(self) -> None:
        """Of a long run that has a report the advice is there, of all of its events."""
        told = reported_advice(self.folder)
        if told is not None:
            self._adviser = Adviser(self._adviser.plan, from_start=False)
            for message in told:
                self._facts.warn(message)

    def _snapshot(self, alive: bool, now: float) -> RunSnapshot:
        facts = self._facts
        behind = self._events.tail.behind or self._samples.tail.behind
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
            left=facts.left(now) if state in ("running", "unknown") else None,
            stage=stage,
            stage_seconds=since,
            stages=facts.spans(),
            seconds=facts.seconds,
            log=facts.log,
            first_loss=facts.first_loss,
            best_evaluation=facts.best_evaluation,
            tokens_per_second=facts.all_rates.median(),
            adapter_step=None if facts.adapter is None else facts.adapter.step,
            curves=facts.curves,
            memory=tuple(facts.memory.values()),
            sample=facts.sample,
            checkpoint=facts.checkpoint,
            on_gpu=facts.on_gpu,
            warnings=tuple(facts.warnings),
            warning_count=facts.warning_count,
            lines=facts.own_lines(),
            log_lines=self._output(),
            event_count=facts.event_count,
            behind=behind,
        )

    def _output(self) -> tuple[str, ...]:
        """The end of the trainer's output, read again where it has changed."""
        path = self.folder.log("trainer")
        try:
            found = path.stat()
        except OSError:
            return ()
        key = found.st_ino, found.st_size, found.st_mtime_ns
        if key != self._output_key:
            self._output_key = key
            self._output_lines = last_lines(path, LOG_LINES, limit_bytes=LOG_BYTES)
        return self._output_lines

    def _take(self, event: Event, now: float, *, asked: bool = True) -> None:
        self._facts.take(event, now)
        for advice in self._adviser.take(event) if asked else ():
            self._facts.warn(advice.message)

    def _stage(self, state: str) -> tuple[str, float | None]:
        """What a run that is alive does, and since when; before its first event that is since it was made."""
        if state not in ("starting", "running", "stopping"):
            return "", None
        event = self._facts.stage
        if event is not None and is_number(event.time):
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
        if self._events.tail.behind:
            return "unknown", "still reading"
        return "killed", f"the trainer is gone without a word after step {facts.step:,}"


def reported_advice(folder: RunFolder) -> tuple[str, ...] | None:
    """The advice of the report that was written at the run's end; None without one."""
    try:
        told = json.loads(folder.report.read_text(encoding="utf-8"))["advice"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tuple(filter(lambda one: isinstance(one, str), told)) if isinstance(told, list) else None


def _prediction(folder: RunFolder, job: TrainingJob) -> Prediction | None:
    """The stored plan's prediction, else one worked out from the job; None where neither is possible."""
    try:
        plan = Plan.from_dict(json.loads(folder.plan.read_text(encoding="utf-8")))
        return Prediction(memory=plan.memory, usable_bytes=plan.gpu.usable_bytes, plan=plan)
    except (OSError, ValueError, VramwiseError):
        pass
    try:
        run = TrainingRun(
            setup=job.setup, model=resolve_model(job.setup.model, images=job.setup.image_patches > 0)
        )
        memory = estimate_memory(run)
    except VramwiseError:
        return None
    return Prediction(memory=memory, usable_bytes=None)
