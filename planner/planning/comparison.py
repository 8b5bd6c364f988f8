"""Several models and GPUs beside each other; the smallest card for a model; the largest models for a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import field
from typing import Any

from planner.answers.plan import DataSummary, Duration, Plan
from planner.base.json_codec import WHERE_SET
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
from planner.search.lean import fits_at_all, longest_that_fits, smallest_that_fits
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model on one GPU with its planned setup; where it does not fit, the smallest setup tried.

    `data`, `duration` and `num_train_epochs` are those of the plan for the data; null without data. Hours and
    dollars are for a million tokens, of the data's own where there is data.
    """

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
    data: DataSummary | None = field(default=None, metadata=WHERE_SET)
    duration: Duration | None = field(default=None, metadata=WHERE_SET)
    num_train_epochs: float | None = field(default=None, metadata=WHERE_SET)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class LargestModels:
    """The largest models that fit on a card, the largest first, and how many smaller ones fit too."""

    models: tuple[LongestLength, ...]
    smaller: int


def row_of(plan: Plan) -> Row:
    """The row of a plan."""
    setup, duration = plan.setup, plan.duration
    millions = 1.0 if plan.data is None or duration is None else duration.tokens / 1e6
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
        hours_per_million_tokens=None if duration is None else duration.hours / millions,
        usd_per_million_tokens=None if duration is None or duration.usd is None else duration.usd / millions,
        data=plan.data,
        duration=None if plan.data is None else duration,
        num_train_epochs=None if plan.data is None else plan.schedule.num_train_epochs,
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


def largest_models(
    target: GpuTarget,
    base: TrainingSetup,
    *,
    fixed: Mapping[str, Any],
    most: int | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LargestModels:
    """The largest models of the catalog that fit, and the longest sequences of each; where `most` are enough,
    of the smaller ones no more than how many fit, which is sooner told.

    Lengths are tried in steps of 64 tokens up to what the model was made for. Several `processes` share the
    models. `progress` is told before the first model and after each how many of how many are done.
    """
    summaries = sorted(
        (one for one in list_models() if not one.sees_images), key=lambda one: (-one.parameter_count, one.id)
    )
    names = [summary.id for summary in summaries]
    asked = _Asked(target, base, fixed)
    found: list[LongestLength] = []
    done = smaller = 0
    progress(done, len(names))
    with closing(spread(lambda index: asked.longest(names[index]), len(names), processes)) as results:
        for longest in results:
            found += [] if longest is None else [longest]
            done += 1
            progress(done, len(names))
            if len(found) == most:
                break
    rest = names[done:]
    with closing(spread(lambda index: asked.fits(rest[index]), len(rest), processes)) as answers:
        for fits in answers:
            smaller += fits
            done += 1
            progress(done, len(names))
    return LargestModels(models=tuple(found), smaller=smaller)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of each model: with which knobs on which card."""

    target: GpuTarget
    base: TrainingSetup
    fixed: Mapping[str, Any]

    def _of(self, name: str) -> tuple[TrainingSetup, Evaluator]:
        """A model's setup at the shortest length that is tried, and who evaluates it."""
        model = resolve_model(name)
        evaluator = Evaluator(model, self.target.spec, self.target.usable_bytes)
        base = _leanest_rank(self.base.replace(model=name), self.fixed, model)
        shortest = min(defaults.SHORTEST_LENGTH, model.max_position_embeddings)
        return base.replace(max_length=shortest), evaluator

    def longest(self, name: str) -> LongestLength | None:
        """The longest sequences of a model; None where it does not fit."""
        base, evaluator = self._of(name)
        effective, limit = base.effective_batch_size, evaluator.model.max_position_embeddings
        length = longest_that_fits(
            base, evaluator, effective_batch_size=effective, fixed=self.fixed, start_length=base.max_length
        )
        if length is None:
            return None
        longest = base.replace(max_length=length)
        found = smallest_that_fits(longest, evaluator, effective_batch_size=effective, fixed=self.fixed)
        if found is None:
            raise AssertionError(f"{name}: nothing fits at the longest length that fits")
        return LongestLength(
            model=evaluator.model.id,
            parameter_count=evaluator.model.parameter_count,
            max_length=length,
            peak_upper_bytes=found.peak_upper_bytes,
            reaches_model_limit=length == limit,
        )

    def fits(self, name: str) -> bool:
        """Whether a model fits at all."""
        base, evaluator = self._of(name)
        return fits_at_all(base, evaluator, effective_batch_size=base.effective_batch_size, fixed=self.fixed)
