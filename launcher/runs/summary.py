"""What all events of a run come to, read once and in bounded memory. Light: no torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from launcher.runs.events import (
    AttemptEvent,
    CheckpointEvent,
    EvalEvent,
    Event,
    LogEvent,
    MemoryEvent,
    StartEvent,
    iter_events,
)

# The first steps load kernels and make the optimizer's state; the rate is steady from the third on.
STEADY_FROM_STEP = 3
MOST_KEPT = 2**16
MOST_PHASES = 16
"""Phases that are told apart; the trainer has four."""


@dataclass(slots=True)
class Figures:
    """Figures in order: all of them while they are few, then every second, every fourth, ..."""

    kept: list[float] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def add(self, value: float) -> None:
        """Count one in."""
        if self._seen % self._stride == 0:
            if len(self.kept) == MOST_KEPT:
                del self.kept[1::2]
                self._stride *= 2
            if self._seen % self._stride == 0:
                self.kept.append(value)
        self._seen += 1

    def median(self) -> float | None:
        """The median; None without any."""
        return statistics.median(self.kept) if self.kept else None


@dataclass(slots=True)
class RunSummary:
    """Of a run: its first start, first and last loss, the highest peak of each phase, rates, and the last
    checkpoint and evaluation.
    """

    start: StartEvent | None = None
    trained: bool = False
    first_loss: float | None = None
    last_loss: float | None = None
    memory: dict[str, MemoryEvent] = field(default_factory=dict)
    rates: Figures = field(default_factory=Figures)
    step_seconds: Figures = field(default_factory=Figures)
    first_step_seconds: float | None = None
    checkpoint: CheckpointEvent | None = None
    evaluation: EvalEvent | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Median rate from the third step on; None when the run was shorter."""
        return self.rates.median()

    def take(self, event: Event) -> None:
        """Count an event in."""
        match event:
            case AttemptEvent(reason="oom"):
                self._forget_what_was_too_much()
            case StartEvent():
                self.start = self.start or event
            case LogEvent():
                self._take_log(event)
            case MemoryEvent():
                # The last of a phase is its highest.
                if event.phase in self.memory or len(self.memory) < MOST_PHASES:
                    self.memory[event.phase] = event
            case CheckpointEvent():
                self.checkpoint = event
            case EvalEvent():
                self.evaluation = event
            case _:
                pass

    def _forget_what_was_too_much(self) -> None:
        """Another setup is trained from here on: peaks, rates and start of the one before are not its own."""
        self.start = self.first_step_seconds = None
        self.memory.clear()
        self.rates, self.step_seconds = Figures(), Figures()

    def _take_log(self, event: LogEvent) -> None:
        if not self.trained and self.start is not None and event.step == self.start.first_step + 1:
            self.first_step_seconds = event.time - self.start.time
        self.trained = True
        if event.loss is not None:
            self.first_loss = event.loss if self.first_loss is None else self.first_loss
            self.last_loss = event.loss
        if event.step_seconds is not None:
            self.step_seconds.add(event.step_seconds)
        if event.step >= STEADY_FROM_STEP and event.tokens_per_second is not None:
            self.rates.add(event.tokens_per_second)


def summarize(path: Path) -> RunSummary:
    """The summary of an event file."""
    summary = RunSummary()
    for event in iter_events(path):
        summary.take(event)
    return summary
