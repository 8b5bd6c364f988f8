"""What the events and samples of a run said so far, in bounded memory.

Figures of a wrong type are left out: the file may come from anywhere.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.runs.events import (
    AdapterEvent,
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
)
from launcher.runs.report.series import CoalescedSeries
from launcher.runs.report.stages import seconds, stage_text
from launcher.runs.summary import STEADY_FROM_STEP, Figures

RECENT_STEPS = 20
WARNINGS = 50
OWN_LINES = 400
"""Lines of the run's own log that are kept: what its events say, the last of them."""
MOST_STAGES = 40
MOST_GPUS = 16
SAMPLES = 512
MOST_PHASES = 16

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class StageSpan:
    """A stage of the run in words, and how long it lasted; null of the present one."""

    text: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Left:
    """Seconds that remain at the pace of the recent steps: of their middle, of the fast and the slow ones."""

    seconds: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """What was logged by step, and what the driver showed by time; `gpus` is memory of each of several."""

    losses: Points = ()
    eval_losses: Points = ()
    learning_rates: Points = ()
    grad_norms: Points = ()
    rates: Points = ()
    used: Points = ()
    busy: Points = ()
    temperatures: Points = ()
    watts: Points = ()
    gpus: tuple[tuple[str, Points], ...] = ()


def _sampled() -> CoalescedSeries:
    return CoalescedSeries(capacity=SAMPLES)


@dataclass(slots=True)
class RunFacts:
    """What the events said so far."""

    step: int = 0
    total_steps: int | None = None
    log: LogEvent | None = None
    end: EndEvent | None = None
    sample: SampleEvent | None = None
    checkpoint: CheckpointEvent | None = None
    adapter: AdapterEvent | None = None
    stage: StageEvent | None = None
    first_loss: float | None = None
    best_evaluation: tuple[float, int] | None = None
    first_time: float | None = None
    last_time: float | None = None
    memory: dict[str, MemoryEvent] = field(default_factory=dict)
    losses: CoalescedSeries = field(default_factory=CoalescedSeries)
    eval_losses: CoalescedSeries = field(default_factory=CoalescedSeries)
    learning_rates: CoalescedSeries = field(default_factory=_sampled)
    grad_norms: CoalescedSeries = field(default_factory=_sampled)
    rates: CoalescedSeries = field(default_factory=_sampled)
    used: CoalescedSeries = field(default_factory=_sampled)
    busy: CoalescedSeries = field(default_factory=_sampled)
    temperatures: CoalescedSeries = field(default_factory=_sampled)
    watts: CoalescedSeries = field(default_factory=_sampled)
    gpus: dict[str, CoalescedSeries] = field(default_factory=dict)
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=WARNINGS))
    warning_count: int = 0
    stages: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=MOST_STAGES))
    lines: deque[str | LogEvent] = field(default_factory=lambda: deque(maxlen=OWN_LINES))
    event_count: int = 0
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    all_rates: Figures = field(default_factory=Figures)
    logged_at: float = 0.0

    def take(self, event: Event, now: float) -> None:
        """Count an event in."""
        if isinstance(event, SampleEvent):
            self._take_sample(event)
            return
        self.event_count += 1
        if is_number(event.time) and event.time:
            self.first_time = event.time if self.first_time is None else self.first_time
            self.last_time = event.time
        match event:
            case LogEvent():
                self._take_log(event, now)
            case MemoryEvent():
                if isinstance(event.phase, str) and len(self.memory) < MOST_PHASES:
                    self.memory[event.phase] = event
            case EvalEvent():
                self._take_evaluation(event)
            case AttemptEvent():
                self._go_back_to(event)
            case StartEvent():
                self.total_steps = event.total_steps if is_number(event.total_steps) else None
                self.end = None
            case CheckpointEvent():
                self.checkpoint = event
                self.lines.append(f"checkpoint of step {event.step:,}")
            case AdapterEvent():
                self.adapter = event
            case StageEvent():
                self._take_stage(event)
            case WarningEvent():
                self.warn(str(event.message))
            case EndEvent():
                self.end = event
                self.step = event.step if is_number(event.step) else self.step
                self.lines.append(f"{event.state}: {event.message}" if event.message else str(event.state))

    def warn(self, message: str) -> None:
        """Count a warning in."""
        self.warning_count += 1
        self.warnings.append(message)

    @property
    def seconds(self) -> float | None:
        """From the first event to the last."""
        if self.first_time is None or self.last_time is None:
            return None
        return max(0.0, self.last_time - self.first_time)

    @property
    def on_gpu(self) -> bool | None:
        """Whether the trainer measures a GPU; None while it has said nothing."""
        if not self.memory:
            return None
        return any(event.allocated_bytes is not None for event in self.memory.values())

    @property
    def curves(self) -> Curves:
        """All curves so far."""
        return Curves(
            losses=self.losses.points(),
            eval_losses=self.eval_losses.points(),
            learning_rates=self.learning_rates.points(),
            grad_norms=self.grad_norms.points(),
            rates=self.rates.points(),
            used=self.used.points(),
            busy=self.busy.points(),
            temperatures=self.temperatures.points(),
            watts=self.watts.points(),
            gpus=tuple((rank, series.points()) for rank, series in self.gpus.items()),
        )

    def own_lines(self) -> tuple[str, ...]:
        """The run's own log in words."""
        total = self.total_steps
        return tuple(one if isinstance(one, str) else _log_line(one, total) for one in self.lines)

    def spans(self) -> tuple[StageSpan, ...]:
        """The stages in order, each with how long it lasted; the last lasts still, unless the run is over."""
        ends = [begun for _, begun in self.stages][1:]
        ends.append(self.last_time if self.end is not None else None)  # type: ignore[arg-type]
        return tuple(
            StageSpan(text, None if end is None else max(0.0, end - begun))
            for (text, begun), end in zip(self.stages, ends, strict=False)
        )

    def left(self, now: float) -> Left | None:
        """Steps that remain at the recent pace, less the time since the last log."""
        if self.total_steps is None or not self.step_seconds or self.end is not None:
            return None
        # The median: one step that waited for a save says nothing about the rest.
        pace = statistics.median(self.step_seconds)
        low, high = _quartiles(self.step_seconds)
        rest, since = self.total_steps - self.step, now - self.logged_at
        return Left(*(max(0.0, rest * one - since) for one in (pace, low, high)))

    def _go_back_to(self, attempt: AttemptEvent) -> None:
        """Forget what this attempt does again."""
        self.end = self.stage = None
        if attempt.number > 1:
            then = f"; {attempt.changes}" if attempt.changes else ""
            self.lines.append(
                f"attempt {attempt.number} ({attempt.reason}), from step {attempt.from_step}{then}"
            )
        if attempt.reason == "oom":
            # Another setup is trained from here on: peaks and rates of the one before are not its own.
            self.memory.clear()
            self.all_rates = Figures()
        if is_number(attempt.from_step):
            self.step = attempt.from_step
            for series in (
                *(self.losses, self.eval_losses, self.learning_rates),
                *(self.grad_norms, self.rates),
            ):
                series.drop_after(attempt.from_step)

    def _take_stage(self, event: StageEvent) -> None:
        text = stage_text(event)
        if self.stages and self.stages[-1][0] != text and is_number(event.time):
            before, begun = self.stages[-1]
            self.lines.append(f"{before}: {seconds(event.time - begun)}")
        if is_number(event.time) and not (self.stages and self.stages[-1][0] == text):
            self.stages.append((text, event.time))
        self.stage = event

    def _take_evaluation(self, event: EvalEvent) -> None:
        if not (is_number(event.step) and is_number(event.loss)) or event.loss is None:
            return
        self.eval_losses.add(event.step, event.loss)
        self.lines.append(f"step {event.step:,}: evaluation loss {event.loss:.4g}")
        if self.best_evaluation is None or event.loss < self.best_evaluation[0]:
            self.best_evaluation = event.loss, event.step

    def _take_log(self, event: LogEvent, now: float) -> None:
        if not is_number(event.step):
            return
        self.log, self.step, self.logged_at = event, event.step, now
        for series, value in (
            (self.losses, event.loss),
            (self.learning_rates, event.learning_rate),
            (self.grad_norms, event.grad_norm),
            (self.rates, event.tokens_per_second),
        ):
            if value is not None and is_number(value):
                series.add(event.step, value)
        if event.loss is not None and is_number(event.loss):
            self.first_loss = event.loss if self.first_loss is None else self.first_loss
        if event.step_seconds is not None and is_number(event.step_seconds):
            self.step_seconds.append(event.step_seconds)
        rate = event.tokens_per_second
        if rate is not None and is_number(rate) and event.step >= STEADY_FROM_STEP:
            self.all_rates.add(rate)
        # Put into words when it is shown: of a million only the last are.
        self.lines.append(event)

    def _take_sample(self, event: SampleEvent) -> None:
        self.sample = event
        if not is_number(event.time):
            return
        used = event.process_bytes if event.used_bytes is None else event.used_bytes
        for series, value in (
            (self.used, used),
            (self.busy, event.utilization_percent),
            (self.temperatures, event.temperature_c),
            (self.watts, event.power_w),
        ):
            if value is not None and is_number(value):
                series.add(event.time, value)
        for rank, held in of_each_gpu(event).items():
            if held[0] is not None and (rank in self.gpus or len(self.gpus) < MOST_GPUS):
                self.gpus.setdefault(rank, _sampled()).add(event.time, held[0])


def of_each_gpu(event: SampleEvent) -> Mapping[str, tuple[float | None, float | None]]:
    """Used bytes and utilisation of each of several GPUs by its rank; what is no figure is left out."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for rank, figures in event.gpus.items():
        if isinstance(figures, list) and len(figures) == 3:
            used, _, busy = figures
            found[str(rank)] = used if is_number(used) else None, busy if is_number(busy) else None
    return found


def _quartiles(values: deque[float]) -> tuple[float, float]:
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def _log_line(event: LogEvent, total: int | None) -> str:
    loss = "" if event.loss is None or not is_number(event.loss) else f"  loss {event.loss:.4g}"
    rate = event.tokens_per_second
    speed = "" if rate is None or not is_number(rate) else f"  {rate:,.0f} tokens/s"
    return f"step {event.step:,}{'' if total is None else f' of {total:,}'}{loss}{speed}"


def is_number(value: object) -> bool:
    """Whether a figure of a file that may come from anywhere is one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
