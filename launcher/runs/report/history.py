"""What all events of a run come to: one pass over the file, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
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

MOST_WARNINGS = 200
MOST_EVALUATIONS = 10_000
MOST_ATTEMPTS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptSpan:
    """An attempt as its events tell it: why it was made, from which step on, and how long it lived."""

    number: int
    reason: str
    from_step: int
    changes: str
    seconds: float
    end_state: str | None


@dataclass(slots=True)
class History:
    """The events so far. Steps that an attempt did again count once, as it did them last."""

    first_time: float | None = None
    last_time: float | None = None
    total_steps: int | None = None
    environment: dict[str, object] = field(default_factory=dict)
    step: int = 0
    tokens: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    losses: CoalescedSeries = field(default_factory=CoalescedSeries)
    evaluations: list[EvalEvent] = field(default_factory=list)
    checkpoints: dict[int, str] = field(default_factory=dict)
    adapter: AdapterEvent | None = None
    memory: dict[str, MemoryEvent] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    warning_count: int = 0
    end: EndEvent | None = None
    stage: StageEvent | None = None
    attempts: list[AttemptSpan] = field(default_factory=list)
    _begun: float | None = None

    @property
    def seconds(self) -> float:
        """How long the attempts lived, without the time between them."""
        return sum(attempt.seconds for attempt in self.spans())

    @property
    def lowest_loss(self) -> tuple[int, float] | None:
        """Step and value of the lowest loss: of a long run, of means over neighbouring steps."""
        points = self.losses.points()
        if not points:
            return None
        step, loss = min(points, key=lambda point: point[1])
        return int(step), loss

    @property
    def best_evaluation(self) -> EvalEvent | None:
        """The evaluation with the lowest loss."""
        told = [event for event in self.evaluations if event.loss is not None]
        return min(told, key=lambda event: event.loss or 0.0, default=None)

    def spans(self) -> list[AttemptSpan]:
        """The attempts; what ran without an attempt event is one."""
        return [*self.attempts[:-1], self._present()] if self.attempts else [self._present()]

    def take_all(self, events: Iterable[Event]) -> History:
        """Count events in; returns itself."""
        for event in events:
            self.take(event)
        return self

    def take(self, event: Event) -> None:
        """Count an event in; samples are of the time that events span, and say nothing here."""
        if isinstance(event, SampleEvent):
            return
        if event.time:
            self.first_time = event.time if self.first_time is None else self.first_time
            if isinstance(event, AttemptEvent):
                self._next_attempt(event)
            self._begun = event.time if self._begun is None else self._begun
            self.last_time = event.time
        match event:
            case StartEvent():
                self.total_steps, self.environment = event.total_steps, dict(event.environment)
                self.end = None
            case LogEvent():
                self._take_log(event)
            case EvalEvent() if len(self.evaluations) < MOST_EVALUATIONS:
                self.evaluations.append(event)
            case CheckpointEvent():
                self.checkpoints[event.step] = event.path
            case AdapterEvent():
                self.adapter = event
            case MemoryEvent():
                self.memory[event.phase] = event
            case WarningEvent():
                self.warning_count += 1
                if len(self.warnings) < MOST_WARNINGS and event.message not in self.warnings:
                    self.warnings.append(event.message)
            case StageEvent():
                self.stage = event
            case EndEvent():
                self.end, self.step = event, event.step
            case _:
                pass

    def _take_log(self, event: LogEvent) -> None:
        self.step = event.step
        self.tokens = event.num_tokens if event.num_tokens is not None else self.tokens
        if event.loss is not None:
            self.first_loss = event.loss if self.first_loss is None else self.first_loss
            self.last_loss = event.loss
            self.losses.add(event.step, event.loss)

    def _next_attempt(self, event: AttemptEvent) -> None:
        if self.attempts:
            self.attempts[-1] = self._present()
        elif self._begun is not None and self.last_time is not None and self.step:
            # Events before the first attempt event: a run that knew none.
            self.attempts.append(self._present())
        if len(self.attempts) < MOST_ATTEMPTS:
            self.attempts.append(
                AttemptSpan(
                    number=event.number,
                    reason=event.reason,
                    from_step=event.from_step,
                    changes=event.changes,
                    seconds=0.0,
                    end_state=None,
                )
            )
        self._begun, self.end, self.step = event.time, None, event.from_step
        if event.from_step == 0:
            self.first_loss = self.last_loss = self.tokens = None
        self.losses.drop_after(event.from_step)
        self.evaluations = [one for one in self.evaluations if one.step <= event.from_step]

    def _present(self) -> AttemptSpan:
        last = self.attempts[-1] if self.attempts else None
        begun, now = self._begun, self.last_time
        return AttemptSpan(
            number=1 if last is None else last.number,
            reason="start" if last is None else last.reason,
            from_step=0 if last is None else last.from_step,
            changes="" if last is None else last.changes,
            seconds=0.0 if begun is None or now is None else max(0.0, now - begun),
            end_state=None if self.end is None else self.end.state,
        )
