"""What layers keep between their passes, at one micro-batch: from everything computed again to nothing."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

from planner.search.choice import Tried, replayed
from planner.search.evaluator import Evaluator
from planner.setup.objective import SFT
from planner.setup.training_setup import TrainingSetup

CHECKPOINTED = "checkpointed"
NOT_CHECKPOINTED = "not checkpointed"
ATTENTION_KEPT = ", attention kept"
OFFLOADED = ", inputs offloaded"
BUDGETS = (0.1, 0.3)
"""Activation memory budgets that were measured between checkpointing and none (docs/throughput.md)."""
MAX_SPENDING_REPLAYS = 4
"""Replays that spend what the chosen setup leaves on fewer checkpointed layers."""


def tried(setup: TrainingSetup, strategy: str, evaluator: Evaluator) -> Tried:
    """Estimate a setup.

    Raises:
        NotModelledError: a knob whose memory is not modelled.
    """
    candidate = evaluator.evaluate(setup)
    return Tried(strategy=strategy, candidate=candidate, fits=evaluator.fits(candidate))


def goes_on(one: Tried, evaluator: Evaluator, *, confirm: bool) -> bool:
    """Whether a larger micro-batch may fit, seeing how this one does."""
    return evaluator.may_fit(one.candidate) if confirm else one.fits


def levels(
    setup: TrainingSetup, prefix: str, evaluator: Evaluator, *, confirm: bool, thorough: bool, offload: bool
) -> Iterator[Tried]:
    """All layers checkpointed comes first; then none, and what lies between where none does not fit.

    What lies between is fewer layers and, where `thorough`, also attention kept and memory budgets. Where all
    checkpointed is too much and `offload` allows it, what the checkpoints keep goes to the host.
    """
    most = tried(setup.replace(gradient_checkpointing=True), prefix + CHECKPOINTED, evaluator)
    yield most
    if offload and not most.fits:
        strategy = prefix + CHECKPOINTED + OFFLOADED
        knobs = {"gradient_checkpointing": True, "activation_offloading": True}
        offloaded = _possible(setup, strategy, evaluator, **knobs)
        if offloaded is not None:
            yield offloaded
    if not goes_on(most, evaluator, confirm=confirm):
        return
    none = _possible(setup, prefix + NOT_CHECKPOINTED, evaluator, gradient_checkpointing=False)
    if none is None:
        return
    yield none
    if none.fits:
        return
    yield from _partly(setup, prefix, evaluator)
    if thorough:
        yield from _between(setup, prefix, evaluator)


def _between(setup: TrainingSetup, prefix: str, evaluator: Evaluator) -> Iterator[Tried]:
    yield from _keeping_attention(setup, prefix, evaluator)
    # With dropout a budget trains on wrong gradients (docs/compilation.md).
    for budget in BUDGETS if setup.compile != "none" and not setup.lora_dropout else ():
        knobs: dict[str, Any] = {"gradient_checkpointing": False, "activation_memory_budget": budget}
        kept = _possible(setup, f"{prefix}activation memory budget {budget:g}", evaluator, **knobs)
        if kept is not None:
            yield kept
        if kept is None or not kept.fits:
            return


def _keeping_attention(setup: TrainingSetup, prefix: str, evaluator: Evaluator) -> Iterator[Tried]:
    """Every layer checkpointed but for its attention, or as few as fit; nothing where none is kept."""
    kept = setup.replace(gradient_checkpointing=True, selective_checkpointing=True)
    if not evaluator.run(kept).keeps_attention:
        return
    selective = _possible(kept, prefix + CHECKPOINTED + ATTENTION_KEPT, evaluator)
    if selective is None:
        return
    yield selective
    if selective.fits:
        yield from _partly(kept, prefix, evaluator)


def _possible(setup: TrainingSetup, strategy: str, evaluator: Evaluator, **knobs: Any) -> Tried | None:
    """The setup with knobs changed; None where their memory is not modelled."""
    candidate = evaluator.try_evaluate(setup.replace(**knobs))
    if candidate is None:
        return None
    return Tried(strategy=strategy, candidate=candidate, fits=evaluator.fits(candidate))


def _partly(setup: TrainingSetup, prefix: str, evaluator: Evaluator) -> Iterator[Tried]:
    """As few layers checkpointed as fit; with other tasks TRL checkpoints all of them or none."""
    if setup.objective is not SFT:
        return
    layers = evaluator.model.num_hidden_layers
    fewest = fewest_layers(layers, lambda some: evaluator.setup_fits(setup.replace(checkpointed_layers=some)))
    if fewest < layers:
        yield _with_layers(setup, prefix, fewest, evaluator)


def fewest_layers(layers: int, fits: Callable[[int], bool]) -> int:
    """The fewest of a model's layers that fit when checkpointed; all of them where none fewer do.

    Memory falls with each checkpointed layer, so halving finds it.
    """
    return 1 + bisect_left(range(1, layers), True, key=fits)


def _with_layers(setup: TrainingSetup, prefix: str, layers: int, evaluator: Evaluator) -> Tried:
    name = f"{prefix}{layers} of {evaluator.model.num_hidden_layers} layers checkpointed"
    if setup.selective_checkpointing:
        name += ATTENTION_KEPT
    return tried(setup.replace(gradient_checkpointing=True, checkpointed_layers=layers), name, evaluator)


def spend(chosen: Tried, evaluator: Evaluator) -> Tried:
    """Checkpoint fewer layers for as long as that fits: the replay's interval leaves more than the fit's."""
    setup = chosen.candidate.setup
    layers = setup.checkpointed_layers
    if layers is None or layers < 2 or not setup.gradient_checkpointing:
        return chosen
    prefix = chosen.strategy.partition(f"{layers} of")[0]
    fewer = evaluator.evaluate(setup.replace(checkpointed_layers=layers - 1))
    step = max(1, fewer.memory.peak_bytes - evaluator.evaluate(setup).memory.peak_bytes)
    best, low = chosen, 0
    for _ in range(MAX_SPENDING_REPLAYS):
        left = evaluator.usable_bytes - best.candidate.peak_upper_bytes
        known = best.candidate.setup.checkpointed_layers or 0
        wanted = max(low + 1, known - left // step)
        if wanted >= known:
            break
        further = _with_layers(setup, prefix, wanted, evaluator)
        if evaluator.fits_replayed(further.candidate.setup):
            best = replayed(further, evaluator)
        else:
            low = wanted
    return best
