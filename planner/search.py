"""Search: of all setups that fit on a card and keep the effective batch, the fastest.

The space is execution strategies x micro-batches, the length and the knobs that a person fixed being given.
Within a strategy memory rises with the micro-batch, so the first one that does not fit ends it. Where a
choice is to be confirmed, the fitted estimate only prunes: the fastest are replayed through the allocator,
one after the other, until one fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from planner.candidate import Candidate, Evaluator
from planner.errors import InputError
from planner.training_setup import TrainingSetup

# Forecasts closer than this are a tie, which the setup with less memory wins.
SPEED_TIE = 0.01
# Replays after which only what fits by the fitted estimate's wide interval is still considered.
MAX_DOUBTFUL_REPLAYS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """A way to run a step: the knobs it sets, and what a person calls it."""

    name: str
    knobs: tuple[tuple[str, Any], ...]


# Further strategies (k of L layers checkpointed, compiled layers, Liger kernels, offloading) join here once
# their memory and time are modelled. Ordered by rising memory.
STRATEGIES = (
    Strategy(name="checkpointed", knobs=(("gradient_checkpointing", True),)),
    Strategy(name="not checkpointed", knobs=(("gradient_checkpointing", False),)),
)
AS_GIVEN = Strategy(name="as given", knobs=())
_DECIDES = (
    "gradient_checkpointing",
    "checkpointed_layers",
    "selective_checkpointing",
    "activation_memory_budget",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A micro-batch and how often it is accumulated."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int


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


def batches(effective: int, num_processes: int, fixed: dict[str, Any]) -> tuple[Batch, ...]:
    """Micro-batches that give the effective batch, smallest first.

    All divisors of a GPU's share are taken, powers of two among them.

    Raises:
        InputError: the fixed micro-batch, accumulation or number of GPUs cannot give that effective batch.
    """
    micro, accumulation = fixed.get("per_device_train_batch_size"), fixed.get("gradient_accumulation_steps")
    if effective % num_processes:
        raise InputError(f"an effective batch of {effective} cannot be shared by {num_processes} GPUs evenly")
    share = effective // num_processes
    found = tuple(
        Batch(per_device_train_batch_size=size, gradient_accumulation_steps=share // size)
        for size in range(1, share + 1)
        if share % size == 0 and micro in (None, size) and accumulation in (None, share // size)
    )
    if not found:
        asked = " and ".join(
            f"{name} {value}"
            for name, value in (
                ("per_device_train_batch_size", micro),
                ("gradient_accumulation_steps", accumulation),
            )
            if value is not None
        )
        gpus = f" on {num_processes} GPUs" if num_processes > 1 else ""
        raise InputError(f"{asked} cannot give an effective batch of {effective}{gpus}")
    return found


def strategies(fixed: dict[str, Any]) -> tuple[Strategy, ...]:
    """Strategies that the fixed knobs leave open."""
    return (AS_GIVEN,) if any(name in fixed for name in _DECIDES) else STRATEGIES


def search(
    base: TrainingSetup,
    evaluator: Evaluator,
    *,
    effective_batch_size: int,
    fixed: dict[str, Any],
    confirm: bool = False,
) -> SearchResult:
    """Find the fastest setup that fits, at the length and with the knobs of `base`.

    With `confirm` it fits by the allocator's replay, which is in its figures; else by the fitted estimate.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
        InputError: the fixed knobs cannot give the effective batch.
    """
    choices = batches(effective_batch_size, base.num_processes, fixed)
    tried: list[Tried] = []
    for strategy in strategies(fixed):
        tried += _climb(base, strategy, choices, evaluator, confirm=confirm)
    if confirm:
        return _confirm(tried, evaluator)
    return SearchResult(tried=tuple(tried), chosen=_fastest([one for one in tried if one.fits]))


def _climb(
    base: TrainingSetup,
    strategy: Strategy,
    choices: tuple[Batch, ...],
    evaluator: Evaluator,
    *,
    confirm: bool,
) -> Iterator[Tried]:
    for batch in choices:
        setup = base.replace(
            per_device_train_batch_size=batch.per_device_train_batch_size,
            gradient_accumulation_steps=batch.gradient_accumulation_steps,
            **dict(strategy.knobs),
        )
        candidate = evaluator.evaluate(setup)
        fits = evaluator.fits(candidate)
        yield Tried(strategy=strategy.name, candidate=candidate, fits=fits)
        if not (evaluator.may_fit(candidate) if confirm else fits):
            return


def _confirm(tried: list[Tried], evaluator: Evaluator) -> SearchResult:
    """Replay the contenders, the fastest first, until one fits; what was replayed shows its replay."""
    found = list(tried)
    contenders = [one for one in tried if evaluator.may_fit(one.candidate)]
    replays = 0
    while (best := _fastest(contenders)) is not None:
        candidate = evaluator.confirm(best.candidate.setup)
        replayed = Tried(strategy=best.strategy, candidate=candidate, fits=evaluator.fits(candidate))
        found[found.index(best)] = replayed
        if replayed.fits:
            return SearchResult(tried=tuple(found), chosen=replayed)
        contenders.remove(best)
        replays += 1
        if replays == MAX_DOUBTFUL_REPLAYS:
            contenders = [one for one in contenders if one.fits]
    return SearchResult(tried=tuple(found), chosen=None)


def _fastest(fitting: list[Tried]) -> Tried | None:
    """The highest rate; within a tie the least memory. Without forecasts, the largest micro-batch."""
    if not fitting:
        return None
    rates = [one.candidate.tokens_per_second for one in fitting]
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates):
        return max(fitting, key=lambda one: one.candidate.setup.per_device_train_batch_size)
    best = max(known)
    tied = [one for one, rate in zip(fitting, known, strict=True) if rate >= best * (1 - SPEED_TIE)]
    return min(tied, key=lambda one: one.candidate.peak_upper_bytes)
