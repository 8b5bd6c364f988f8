"""Advice: changes that make a plan fit, or that use what it leaves. Each is a request of its own, answered as
a plan for it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain, islice

from planner.answers.plan import Advice
from planner.base.errors import InputError
from planner.models.catalog import ModelSummary, list_models
from planner.models.spec import ModelSpec
from planner.planning.asked import Asked
from planner.planning.choosing import Chosen
from planner.planning.longest import longest_context
from planner.planning.savings import (
    Change,
    change,
    left_to_the_plan,
    savings,
    smaller_rank,
    to_method,
    together,
)
from planner.setup.options import differences, option
from planner.setup.training_setup import TrainingSetup

LARGE_RANKS = (64, 32)
MAX_ADVICE = 6
LEAST_GAIN = 0.02
"""Speed that how a run is executed has to bring to be worth a line."""


def advice(asked: Asked, *, most: int | None = None) -> tuple[Advice, ...]:
    """What makes a request fit, or what uses the memory that its plan leaves.

    With `most`, only so many of those that fit, which are the first of all of them.
    """
    if asked.chosen.fits:
        return tuple(islice(use_what_is_left(asked), most))
    if most is None:
        return make_it_fit(asked)
    return tuple(islice(_that_fit(asked), most))


def use_what_is_left(asked: Asked) -> Iterator[Advice]:
    """Ways to spend the memory that a fitting plan leaves: how it runs, rank, 16-bit LoRA.

    None of them may cost length. How long sequences may be is an answer of its own
    (planner/planning/longest.py).
    """
    setup = asked.chosen.tried.candidate.setup
    freed = left_to_the_plan(asked)
    found = None if freed is None else _ask(asked, freed)
    if freed is not None and found is not None and found.fits and (gain(asked, found) or 0.0) >= LEAST_GAIN:
        yield _advice(asked, freed, found)
    ranks = [rank for rank in LARGE_RANKS if setup.uses_lora and rank > setup.lora_r]
    groups = [[change(f"rank {rank}", "a larger adapter", lora_r=rank) for rank in ranks]]
    if setup.method == "qlora":
        groups.append([to_method(asked, "lora", "16-bit LoRA", "no quantisation of the base")])
    for group in groups:
        rows = (row for one in group for row in _rows(asked, one))
        yield from islice((row for row in rows if _keeps_length(row, setup)), 1)


def make_it_fit(asked: Asked) -> tuple[Advice, ...]:
    """Changes to a request that does not fit: those that make it fit first, then by bytes saved."""
    useful = [one for one in _singles(asked) if one.fits or one.change_bytes < 0]
    if not any(one.fits for one in useful):
        useful += _combined(asked)
    # Changes come with the least harm first, and the sort keeps that order among those that fit.
    useful.sort(key=lambda one: (not one.fits, 0 if one.fits else one.change_bytes))
    return (*useful[:MAX_ADVICE], *_beside_the_setup(asked))


def _that_fit(asked: Asked) -> Iterator[Advice]:
    """Of what make_it_fit has those that fit, without a replay of those that clearly do not."""
    single = False
    for one in _singles(asked, only_fitting=True):
        if one.fits:
            single = True
            yield one
    others = _beside_the_setup(asked) if single else chain(_combined(asked), _beside_the_setup(asked))
    yield from (one for one in others if one.fits)


def _singles(asked: Asked, *, only_fitting: bool = False) -> Iterator[Advice]:
    """Single changes, the least harmful first; `only_fitting`, what clearly does not fit is left out."""
    setup = asked.chosen.tried.candidate.setup
    freed, rank = left_to_the_plan(asked), smaller_rank(setup)
    kinds = [one for kind in savings(asked, setup) for one in kind]
    for one in (*([freed] if freed is not None else ()), *kinds):
        yield from _rows(asked, one, only_fitting=only_fitting)
    yield from _shorter(asked)
    if rank is not None:
        yield from _rows(asked, rank, only_fitting=only_fitting)


def _shorter(asked: Asked, others: Change | None = None) -> Iterator[Advice]:
    """The longest sequences that fit, with other changes or alone, where a length that does not was fixed."""
    wished = asked.request.fixed.get("max_length")
    if not isinstance(wished, int):
        return
    changed = asked if others is None else asked.with_request(others.of(asked.request))
    try:
        longest = longest_context(changed.request, changed.target, changed.evaluator)
    except InputError:
        return
    if longest is None or longest.max_length >= wished:
        return
    title, effect = f"length {longest.max_length:,} instead of {wished:,}", "longer examples are cut"
    shorter = change(title, effect, max_length=longest.max_length)
    if others is not None:
        shorter = together([others, shorter])
    yield from _rows(asked, shorter)


def _combined(asked: Asked) -> Iterator[Advice]:
    """All savings at once, at the longest length at which that fits; nothing for a single one."""
    setup = asked.chosen.tried.candidate.setup
    kinds = [kind[-1] for kind in savings(asked, setup) if kind]
    rank = smaller_rank(setup)
    changes = kinds if rank is None else [*kinds, rank]
    if not changes:
        return
    everything = together(changes)
    try:
        fits = asked.with_request(everything.of(asked.request)).can_fit()
    except InputError:
        return
    if not fits:
        yield from _shorter(asked, everything)
    elif len(changes) > 1:
        yield from _rows(asked, everything)


def _beside_the_setup(asked: Asked) -> Iterator[Advice]:
    yield from _free_memory(asked)
    yield from _smaller_model(asked)


def _rows(asked: Asked, one: Change, *, only_fitting: bool = False) -> Iterator[Advice]:
    """A change with what a plan for it answers; nothing where that cannot be asked."""
    found = _ask(asked, one, only_fitting=only_fitting)
    if found is not None:
        yield _advice(asked, one, found)


def _ask(asked: Asked, one: Change, *, only_fitting: bool = False) -> Chosen | None:
    try:
        there = asked.with_request(one.of(asked.request))
    except InputError:
        return None
    return there.answer if not only_fitting or there.can_fit() else None


def _advice(asked: Asked, one: Change, found: Chosen) -> Advice:
    """A change with the figures of its answer, and what else is different there."""
    candidate, now = found.tried.candidate, asked.chosen.tried.candidate
    speed = candidate.speed
    return Advice(
        title=one.title,
        flags=one.flags,
        without=one.left_out(asked.request),
        effect=one.effect,
        changes=other_knobs(asked, found, one.told),
        faster=gain(asked, found),
        peak_upper_bytes=candidate.peak_upper_bytes,
        change_bytes=candidate.peak_upper_bytes - now.peak_upper_bytes,
        fits=found.fits,
        tokens_per_second=None if speed is None else speed.tokens_per_second,
        setup=candidate.setup,
    )


def other_knobs(asked: Asked, found: Chosen, told: Collection[str] = ()) -> tuple[str, ...]:
    """How an answer's setup differs from the plan's, but for knobs that are `told`. How often batches are
    accumulated goes without saying where as many sequences share a step.
    """
    now, then = asked.chosen.tried.candidate.setup, found.tried.candidate.setup
    if now.effective_batch_size == then.effective_batch_size:
        told = {*told, "gradient_accumulation_steps"}
    if (now.model, now.method) != (then.model, then.method):
        told = {*told, "experts"}  # which another method, or a model without any, says nothing of
    return differences(now, then, told=told)


def gain(asked: Asked, found: Chosen) -> float | None:
    """By what share an answer is faster than the plan; None without a forecast, and for another model."""
    now, then = asked.chosen.tried.candidate, found.tried.candidate
    if now.tokens_per_second is None or then.tokens_per_second is None:
        return None
    if now.setup.model != then.setup.model:
        return None
    return then.tokens_per_second / now.tokens_per_second - 1


def _keeps_length(one: Advice, setup: TrainingSetup) -> bool:
    return one.fits and one.setup is not None and one.setup.max_length >= setup.max_length


def _free_memory(asked: Asked) -> Iterator[Advice]:
    if not asked.target.held_bytes:
        return
    display = asked.request.display
    found = asked.alone().answer
    if found is not None:
        freed = Change(
            title="detach the display" if display else "close the other processes on the GPU",
            effect="frees what they hold",
        )
        row = _advice(asked, freed, found)
        yield replace(row, without=tuple(option("display", True)) if display else (), setup=None)


def _smaller_model(asked: Asked) -> Iterator[Advice]:
    """The largest smaller model of the family that fits and was made for sequences as long as asked for."""
    wished = asked.request.fixed.get("max_length", 0)
    for summary in _family(asked.model):
        if isinstance(wished, int) and wished > summary.max_position_embeddings:
            continue
        there = asked.of_model(summary.id)
        found = there.answer if there.can_fit() else None
        if found is not None and found.fits:
            one = Change(title=f"{summary.id} instead", effect="the largest of its family that fits")
            yield replace(_advice(asked, one, found), flags=f"--model {summary.id}")
            return


def _family(model: ModelSpec) -> list[ModelSummary]:
    """Smaller catalog models of the same name: those of the same generation first, the largest first."""
    name = re.match(r"[a-z]+", model.id)
    generation = model.id.rpartition("-")[0]
    smaller = [
        summary
        for summary in list_models()
        if name is not None
        and summary.id.startswith(name[0])
        and summary.sees_images == (model.tower is not None)
        and summary.parameter_count < model.parameter_count
    ]
    return sorted(smaller, key=lambda s: (s.id.rpartition("-")[0] != generation, -s.parameter_count))
