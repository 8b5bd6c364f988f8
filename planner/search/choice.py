"""What was tried, and the choice among it: the first to be done of those that fit."""

from __future__ import annotations

from planner.base.values import dataclass
from planner.search.evaluator import Candidate, Evaluator
from planner.setup.training_setup import TrainingSetup

# Forecasts closer than this are a tie, which the setup with less memory wins.
SPEED_TIE = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A candidate of the search and its strategy; `fits` on the card asked for."""

    strategy: str
    candidate: Candidate
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """All that was tried, in order, and the fastest that fits (null if none does)."""

    tried: tuple[Tried, ...]
    chosen: Tried | None

    @property
    def smallest(self) -> Tried:
        """The one that needs least memory."""
        return min(self.tried, key=lambda one: one.candidate.peak_upper_bytes)


def replayed(one: Tried, evaluator: Evaluator) -> Tried:
    """The same as the allocator's replay has it."""
    candidate = evaluator.confirm(one.candidate.setup)
    return Tried(strategy=one.strategy, candidate=candidate, fits=evaluator.fits(candidate))


def finish_seconds(candidate: Candidate, tokens: int) -> float | None:
    """Seconds until a run of so many tokens is done, compilation included; None without a forecast.

    With data the tokens are the examples' own, else those of full sequences.
    """
    rate = candidate.tokens_per_second
    if rate is None or candidate.speed is None:
        return None
    return tokens / rate + candidate.speed.compile_seconds


def fastest(fitting: list[Tried], tokens: int) -> Tried | None:
    """The first to be done; within a tie one that offloads nothing, of the least memory. Without forecasts,
    the largest micro-batch that needs no offloading, else the largest.
    """
    if not fitting:
        return None
    times = [finish_seconds(one.candidate, tokens) for one in fitting]
    known = [seconds for seconds in times if seconds is not None]
    if len(known) < len(times):
        return max(fitting, key=lambda one: _unforecast(one.candidate.setup))
    best = min(known)
    tied = [one for one, seconds in zip(fitting, known, strict=True) if seconds <= best * (1 + SPEED_TIE)]
    return min(
        tied, key=lambda one: (one.candidate.setup.activation_offloading, one.candidate.peak_upper_bytes)
    )


def _unforecast(setup: TrainingSetup) -> tuple[bool, int]:
    return not setup.activation_offloading, setup.per_device_train_batch_size
