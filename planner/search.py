"""Search: of all setups that fit on a card and keep the effective batch, the one that is done first.

The space is execution strategies (eager or compiled layers; all, some or none of them checkpointed) x
micro-batches, the length and the knobs that a person fixed being given. Memory left over is speed left
behind: where a micro-batch fits with every layer checkpointed and not with none, as many layers as fit go
without. Where a choice is to be confirmed, the fitted estimate only prunes: the fastest are replayed through
the allocator, one after the other, until one fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from planner.candidate import Candidate, Evaluator
from planner.errors import InputError
from planner.throughput import compile_seconds
from planner.training_setup import TrainingSetup

# Forecasts closer than this are a tie, which the setup with less memory wins.
SPEED_TIE = 0.01
# Replays after which only what fits by the fitted estimate's wide interval is still considered.
MAX_DOUBTFUL_REPLAYS = 8
# Replays that spend what the chosen setup leaves on fewer checkpointed layers.
MAX_SPENDING_REPLAYS = 4
TOKENS = 10_000_000
"""Tokens that a run is taken to have where its data is not known: a few thousand examples, some epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """How layers are executed: the knobs it sets, and what a person calls it (nothing for eager layers)."""

    name: str
    knobs: tuple[tuple[str, Any], ...]


EAGER = Mode(name="", knobs=())
COMPILED = Mode(name="compiled, ", knobs=(("compile", "regional"),))
_DECIDES = (
    "gradient_checkpointing",
    "checkpointed_layers",
    "selective_checkpointing",
    "activation_memory_budget",
)
PLAIN = {
    "gradient_checkpointing": True,
    "checkpointed_layers": None,
    "selective_checkpointing": False,
    "activation_memory_budget": None,
    "compile": "none",
}
"""What a search starts from, whatever an earlier one had chosen."""
AS_GIVEN = "as given"
CHECKPOINTED = "checkpointed"
NOT_CHECKPOINTED = "not checkpointed"


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


def modes(base: TrainingSetup, evaluator: Evaluator, fixed: dict[str, Any]) -> tuple[Mode, ...]:
    """Ways to execute layers that the fixed knobs leave open and that this card and data allow.

    Compiled layers want batches of one shape: every other length would be compiled anew.
    """
    if "compile" in fixed:
        return (EAGER,)
    one_shape = base.packing or not evaluator.padded
    return (EAGER, COMPILED) if one_shape and evaluator.compiles else (EAGER,)


def search(
    base: TrainingSetup,
    evaluator: Evaluator,
    *,
    effective_batch_size: int,
    fixed: dict[str, Any],
    confirm: bool = False,
    tokens: int = TOKENS,
) -> SearchResult:
    """Find the setup that is first done with so many tokens, at the length and with the knobs of `base`.

    With `confirm` it fits by the allocator's replay, which is in its figures; else by the fitted estimate.

    Raises:
        NotModelledError: a fixed knob whose memory is not modelled.
        InputError: the fixed knobs cannot give the effective batch.
    """
    choices = batches(effective_batch_size, base.num_processes, fixed)
    decided = any(name in fixed for name in _DECIDES)
    if not decided:
        base = base.replace(**{name: value for name, value in PLAIN.items() if name not in fixed})
    tried: list[Tried] = []
    for mode in modes(base, evaluator, fixed):
        setup = base.replace(**dict(mode.knobs))
        if mode is not EAGER and evaluator.try_evaluate(setup) is None:
            continue
        if decided:
            tried += _climb(setup, mode.name + AS_GIVEN, choices, evaluator, confirm=confirm)
        else:
            for batch in choices:
                level = list(_levels(_at(setup, batch), mode, evaluator, confirm=confirm))
                tried += level
                if not _goes_on(level[0], evaluator, confirm=confirm):
                    break
    if confirm:
        return _confirm(tried, evaluator, tokens)
    return SearchResult(tried=tuple(tried), chosen=_fastest([one for one in tried if one.fits], tokens))


def _at(base: TrainingSetup, batch: Batch) -> TrainingSetup:
    return base.replace(
        per_device_train_batch_size=batch.per_device_train_batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
    )


def _climb(
    base: TrainingSetup, strategy: str, choices: tuple[Batch, ...], evaluator: Evaluator, *, confirm: bool
) -> Iterator[Tried]:
    """Micro-batches of one strategy; memory rises with them, so the first that does not fit ends it."""
    for batch in choices:
        one = _tried(_at(base, batch), strategy, evaluator)
        yield one
        if not _goes_on(one, evaluator, confirm=confirm):
            return


def _goes_on(one: Tried, evaluator: Evaluator, *, confirm: bool) -> bool:
    return evaluator.may_fit(one.candidate) if confirm else one.fits


def _levels(setup: TrainingSetup, mode: Mode, evaluator: Evaluator, *, confirm: bool) -> Iterator[Tried]:
    """One micro-batch with all layers checkpointed, with none, and with as few as fit."""
    most = _tried(setup.replace(gradient_checkpointing=True), mode.name + CHECKPOINTED, evaluator)
    yield most
    if not _goes_on(most, evaluator, confirm=confirm):
        return
    none = _tried(setup.replace(gradient_checkpointing=False), mode.name + NOT_CHECKPOINTED, evaluator)
    yield none
    if none.fits:
        return
    low, high = 0, evaluator.model.num_hidden_layers
    while high - low > 1:
        middle = (low + high) // 2
        if evaluator.fits(evaluator.evaluate(setup.replace(checkpointed_layers=middle))):
            high = middle
        else:
            low = middle
    if high < evaluator.model.num_hidden_layers:
        yield _partly(setup, mode.name, high, evaluator)


def _partly(setup: TrainingSetup, prefix: str, layers: int, evaluator: Evaluator) -> Tried:
    name = f"{prefix}{layers} of {evaluator.model.num_hidden_layers} layers checkpointed"
    return _tried(setup.replace(gradient_checkpointing=True, checkpointed_layers=layers), name, evaluator)


def _tried(setup: TrainingSetup, strategy: str, evaluator: Evaluator) -> Tried:
    candidate = evaluator.evaluate(setup)
    return Tried(strategy=strategy, candidate=candidate, fits=evaluator.fits(candidate))


def _confirm(tried: list[Tried], evaluator: Evaluator, tokens: int) -> SearchResult:
    """Replay the contenders, the fastest first, until one fits; what was replayed shows its replay."""
    found = list(tried)
    contenders = [one for one in tried if evaluator.may_fit(one.candidate)]
    replays = 0
    while (best := _fastest(contenders, tokens)) is not None:
        replayed = _replayed(best, evaluator)
        found[found.index(best)] = replayed
        if replayed.fits:
            spent = _spend(replayed, evaluator)
            if spent is not replayed:
                found.append(spent)
            return SearchResult(tried=tuple(found), chosen=spent)
        contenders.remove(best)
        replays += 1
        if replays == MAX_DOUBTFUL_REPLAYS:
            contenders = [one for one in contenders if one.fits]
    return SearchResult(tried=tuple(found), chosen=None)


def _replayed(one: Tried, evaluator: Evaluator) -> Tried:
    candidate = evaluator.confirm(one.candidate.setup)
    return Tried(strategy=one.strategy, candidate=candidate, fits=evaluator.fits(candidate))


def _spend(chosen: Tried, evaluator: Evaluator) -> Tried:
    """Checkpoint fewer layers for as long as that fits: the replay's interval leaves more than the fit's."""
    setup = chosen.candidate.setup
    layers = setup.checkpointed_layers
    if layers is None or not setup.gradient_checkpointing:
        return chosen
    prefix = chosen.strategy.partition(f"{layers} of")[0]
    fewer = evaluator.evaluate(setup.replace(checkpointed_layers=layers - 1)) if layers > 1 else None
    if fewer is None:
        return chosen
    fitted = evaluator.evaluate(setup)
    step = max(1, fewer.memory.peak_bytes - fitted.memory.peak_bytes)
    best, low = chosen, 0
    for _ in range(MAX_SPENDING_REPLAYS):
        left = evaluator.usable_bytes - best.candidate.peak_upper_bytes
        known = best.candidate.setup.checkpointed_layers or 0
        wanted = max(low + 1, known - left // step)
        if wanted >= known:
            break
        tried = _replayed(_partly(setup, prefix, wanted, evaluator), evaluator)
        if tried.fits:
            best = tried
        else:
            low = wanted
    return best


def finish_seconds(candidate: Candidate, tokens: int) -> float | None:
    """Seconds until a run of so many tokens is done, compilation included; None without a forecast."""
    rate = candidate.tokens_per_second
    return None if rate is None else tokens / rate + compile_seconds(candidate.setup)


def _fastest(fitting: list[Tried], tokens: int) -> Tried | None:
    """The first to be done; within a tie the least memory. Without forecasts, the largest micro-batch."""
    if not fitting:
        return None
    times = [finish_seconds(one.candidate, tokens) for one in fitting]
    known = [seconds for seconds in times if seconds is not None]
    if len(known) < len(times):
        return max(fitting, key=lambda one: one.candidate.setup.per_device_train_batch_size)
    best = min(known)
    tied = [one for one, seconds in zip(fitting, known, strict=True) if seconds <= best * (1 + SPEED_TIE)]
    return min(tied, key=lambda one: one.candidate.peak_upper_bytes)
