"""Several models and GPUs beside each other; the smallest card for a model; the largest models for a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import Any

from planner.answers.plan import Plan
from planner.base.spread import spread
from planner.base.values import dataclass
from planner.gpus.target import GpuTarget
from planner.models.catalog import list_models, resolve_model
from planner.models.spec import ModelSpec
from planner.planning.choosing import ranks
from planner.search.cards import (
    DESKTOP,
    RENTED,
    cards_by_memory,
    needed_at_least,
    smallest_first,
    smallest_gpus,
)
from planner.search.evaluator import Evaluator
from planner.search.lean import longest_that_fits, smallest_that_fits
from planner.setup import defaults
from planner.setup.defaults import DEFAULT_LENGTHS
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model on one GPU with its planned setup; where it does not fit, the smallest setup tried."""

    model: str
    gpu: str
    method: str
    fits: bool
    max_length: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    peak_upper_bytes: int
    usable_bytes: int
    tokens_per_second: float | None
    hours_per_million_tokens: float | None
    usd_per_million_tokens: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallestCard:
    """The cards with least memory that take a model by a method at a length, one for a desktop and one to
    rent; null when none does. `gpu` is the one of them with less memory, the bytes are of that.
    """

    method: str
    max_length: int
    peak_upper_bytes: int
    gpu: str | None
    usable_bytes: int | None
    desktop_card: str | None
    rented_card: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LongestLength:
    """How long a model's sequences may be on a card, by anything that a plan tries."""

    model: str
    parameter_count: int
    max_length: int
    peak_upper_bytes: int
    reaches_model_limit: bool


def row_of(plan: Plan) -> Row:
    """The row of a plan made without data."""
    setup, duration = plan.setup, plan.duration
    return Row(
        model=plan.request.model,
        gpu=plan.gpu.text.strip(),
        method=setup.method,
        fits=plan.fits,
        max_length=setup.max_length,
        per_device_train_batch_size=setup.per_device_train_batch_size,
        gradient_accumulation_steps=setup.gradient_accumulation_steps,
        gradient_checkpointing=setup.gradient_checkpointing,
        peak_upper_bytes=plan.memory.peak_upper_bytes,
        usable_bytes=plan.gpu.usable_bytes,
        tokens_per_second=None if plan.speed is None else plan.speed.tokens_per_second,
        hours_per_million_tokens=None if duration is None else duration.hours,
        usd_per_million_tokens=None if duration is None else duration.usd,
    )


def smallest_cards(
    base: TrainingSetup,
    model: ModelSpec,
    methods: tuple[str, ...],
    *,
    fixed: Mapping[str, Any],
    given_length: int | None = None,
    held_bytes: int = 0,
) -> tuple[SmallestCard, ...]:
    """The smallest cards for each method and default length (or the given one), the `fixed` knobs kept: of
    each kind the first on which anything that a plan tries fits with `held_bytes` held by others.

    Raises:
        NotModelledError: a knob whose memory is not modelled.
    """
    from planner.setup.methods import with_method

    largest = cards_by_memory()[-1]
    evaluator = Evaluator(model, largest, largest.usable_bytes)
    effective = base.effective_batch_size
    found = []
    for method in methods:
        for length in defaults.lengths(model, given_length, None):
            setup = _leanest_rank(with_method(base, method).replace(max_length=length), fixed, model)
            cards = smallest_gpus(setup, evaluator, fixed, effective, held_bytes=held_bytes)
            least, names = smallest_first(cards), {one.kind: one.gpu.id for one in cards}
            found.append(
                SmallestCard(
                    method=method,
                    max_length=length,
                    peak_upper_bytes=(
                        needed_at_least(setup, evaluator, fixed, effective)
                        if least is None
                        else least.peak_upper_bytes
                    ),
                    gpu=None if least is None else least.gpu.id,
                    usable_bytes=None if least is None else least.gpu.usable_bytes,
                    desktop_card=names.get(DESKTOP),
                    rented_card=names.get(RENTED),
                )
            )
    return tuple(found)


def _leanest_rank(setup: TrainingSetup, fixed: Mapping[str, Any], model: ModelSpec) -> TrainingSetup:
    """The setup at the lowest rank that a plan tries."""
    return setup.replace(lora_r=ranks(setup, fixed, model)[-1])


def longest_lengths(
    target: GpuTarget,
    base: TrainingSetup,
    *,
    fixed: Mapping[str, Any],
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LongestLength, ...]:
    """For each model of the catalog that fits, the longest sequences that do; the largest model first.

    Lengths are tried in steps of 64 tokens up to what the model was made for. Several `processes` share the
    models. `progress` is told before the first model and after each how many of how many are done.
    """
    names = [summary.id for summary in list_models()]
    one = partial(_longest, target, base, dict(fixed))
    found = []
    progress(0, len(names))
    with closing(spread(lambda index: one(names[index]), len(names), processes)) as results:
        for longest in results:
            found.append(longest)
            progress(len(found), len(names))
    fitting = [longest for longest in found if longest is not None]
    return tuple(sorted(fitting, key=lambda one: (-one.parameter_count, one.model)))


def _longest(
    target: GpuTarget, base: TrainingSetup, fixed: Mapping[str, Any], name: str
) -> LongestLength | None:
    model = resolve_model(name)
    evaluator = Evaluator(model, target.spec, target.usable_bytes)
    base = _leanest_rank(base.replace(model=name), fixed, model)
    limit = model.max_position_embeddings
    effective = base.effective_batch_size
    start = min(DEFAULT_LENGTHS[-1], limit)
    length = longest_that_fits(
        base, evaluator, effective_batch_size=effective, fixed=fixed, start_length=start
    )
    if length is None:
        return None
    longest = base.replace(max_length=length)
    found = smallest_that_fits(longest, evaluator, effective_batch_size=effective, fixed=fixed)
    if found is None:
        raise AssertionError(f"{name}: nothing fits at the longest length that fits")
    return LongestLength(
        model=model.id,
        parameter_count=model.parameter_count,
        max_length=length,
        peak_upper_bytes=found.peak_upper_bytes,
        reaches_model_limit=length == limit,
    )
