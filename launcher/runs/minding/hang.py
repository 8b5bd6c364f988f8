"""Tells work that takes long from work that stands still, by the trainer's heartbeat. Light: no torch.

Only time that the watcher has lived through counts: a suspended machine, a frozen container or a corrected
clock is no silence of the trainer.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path

from launcher.runs.heartbeat import Beat, read_beat

KEPT_INTERVALS = 1000
LONGEST_TICK_SECONDS = 5.0
"""What one look of the watcher may add to a silence; it looks five times a second."""
MEASURED = ("training", "evaluating")
"""Stages whose beats come one a micro-step or batch, so that the run itself says what is long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HangLimits:
    """Seconds without a beat that are taken for a hang.

    In a measured stage `factor` x the 99th percentile of the intervals so far, and never less than
    `floor_seconds`; until `known_after` intervals have been seen, `unmeasured_seconds`: kernels are loaded
    and compiled then. The other stages beat once, and have a limit of their own. Waiting (for room on the
    disk) has none.
    """

    floor_seconds: float = 60.0
    factor: float = 10.0
    known_after: int = 5
    unmeasured_seconds: float = 1800.0
    loading_seconds: float = 3600.0
    compiling_seconds: float = 1800.0
    saving_seconds: float = 1800.0

    def of(self, stage: str, intervals: deque[float]) -> float:
        """The limit of a stage."""
        if stage in MEASURED:
            if len(intervals) < self.known_after:
                return max(self.floor_seconds, self.unmeasured_seconds)
            return max(self.floor_seconds, self.factor * percentile_99(intervals))
        fixed = {
            "loading": self.loading_seconds,
            "compiling": self.compiling_seconds,
            "saving": self.saving_seconds,
            "waiting": math.inf,
        }
        return fixed.get(stage, self.unmeasured_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Silence:
    """A trainer without a sign of life: since which stage and step, for how long, and what the limit was."""

    stage: str
    step: int
    seconds: float
    limit_seconds: float

    def __str__(self) -> str:
        return (
            f"no sign of life for {self.seconds:.0f} s while {self.stage}, after step {self.step:,} "
            f"(the limit is {self.limit_seconds:.0f} s)"
        )


@dataclass(slots=True)
class HangWatch:
    """Watches one trainer's heartbeat; `tick` is to be called a few times a second."""

    path: Path
    limits: HangLimits = field(default_factory=HangLimits)
    _beat: Beat | None = field(default=None, init=False)
    _silent: float = field(default=0.0, init=False)
    _ticked: float | None = field(default=None, init=False)
    _intervals: defaultdict[str, deque[float]] = field(init=False)

    def __post_init__(self) -> None:
        self._intervals = defaultdict(lambda: deque(maxlen=KEPT_INTERVALS))

    def tick(self, now: float) -> Silence | None:
        """Look at the heartbeat `now` (a reading of the monotonic clock): is it silent for too long?"""
        if self._ticked is not None:
            self._silent += min(max(0.0, now - self._ticked), LONGEST_TICK_SECONDS)
        self._ticked = now
        beat = read_beat(self.path)
        if beat is not None and beat != self._beat:
            if self._beat is not None and self._beat.stage == beat.stage:
                self._intervals[beat.stage].append(self._silent)
            self._beat, self._silent = beat, 0.0
        stage, step = ("loading", 0) if self._beat is None else (self._beat.stage, self._beat.step)
        limit = self.limits.of(stage, self._intervals[stage])
        if self._silent <= limit:
            return None
        return Silence(stage=stage, step=step, seconds=self._silent, limit_seconds=limit)


def percentile_99(values: deque[float]) -> float:
    """The smallest of the values that 99% do not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]
