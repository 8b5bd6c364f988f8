"""Advice: changes that make a plan fit, or that use what it leaves, each estimated like the plan itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from planner.answers.plan import Advice
from planner.gpus.target import GpuTarget
from planner.models.catalog import ModelSummary, list_models, resolve_model
from planner.models.spec import ModelSpec
from planner.planning.savings import Change, all_together, change, change_to, savings
from planner.search import search
from planner.search.evaluator import Candidate, Evaluator
from planner.setup.methods import with_method
from planner.setup.request import PlanRequest
from planner.setup.training_setup import TrainingSetup

LARGE_RANKS = (64, 32)
MAX_ADVICE = 6
KEPT = ("packing", "train_sampling_strategy", "attn_implementation")
"""What the plan has chosen and advice leaves as it is: how examples are batched."""


def make_it_fit(evaluator: Evaluator, setup: TrainingSetup, target: GpuTarget) -> tuple[Advice, ...]:
    """Changes to a setup that does not fit: those that make it fit first, then by bytes saved."""
    now = evaluator.evaluate(setup).peak_upper_bytes
    kinds = savings(setup, evaluator.model, target)
    found = [_estimated(evaluator, one, now) for kind in kinds for one in kind]
    combined = all_together(setup, evaluator.model, target)
    useful = [one for one in found if one is not None and one.change_bytes < 0]
    together = None if combined is None else _estimated(evaluator, combined, now)
    if together is not None and len(useful) > 1 and not any(one.fits for one in useful):
        useful.append(together)
    # Changes come with the least harm first, and the sort keeps that order among those that fit.
    useful.sort(key=lambda one: (not one.fits, 0 if one.fits else one.change_bytes))
    extra = [_free_memory(now, target, evaluator), _smaller_model(evaluator, setup, now)]
    return (*useful[:MAX_ADVICE], *(one for one in extra if one is not None))


def use_what_is_left(
    evaluator: Evaluator, setup: TrainingSetup, request: PlanRequest, effective_batch_size: int | None = None
) -> tuple[Advice, ...]:
    """Ways to spend the memory that a fitting plan leaves: rank, 16-bit LoRA; each searched anew.

    How long sequences may be is an answer of its own (planner/planning/longest.py).

    `effective_batch_size` counts examples; the setup's own sequences stand for them without it.
    """
    effective = setup.effective_batch_size if effective_batch_size is None else effective_batch_size
    now = evaluator.evaluate(setup).peak_upper_bytes
    found = []
    for group in _spendings(setup):
        for spending in group:
            best = _searched(evaluator, spending.setup, effective, request)
            if best is not None:
                found.append(_advice(spending, best, now, fits=True))
                break
    return tuple(found)


def _estimated(evaluator: Evaluator, one: Change, now: int) -> Advice | None:
    candidate = evaluator.try_evaluate(one.setup)
    return None if candidate is None else _advice(one, candidate, now, fits=evaluator.fits(candidate))


def _advice(one: Change, candidate: Candidate, now: int, *, fits: bool) -> Advice:
    """A change with the figures of a setup that makes it."""
    return Advice(
        title=one.title,
        flags=one.flags,
        effect=one.effect,
        peak_upper_bytes=candidate.peak_upper_bytes,
        change_bytes=candidate.peak_upper_bytes - now,
        fits=fits,
        tokens_per_second=candidate.tokens_per_second,
        setup=one.setup,
    )


def _free_memory(now: int, target: GpuTarget, evaluator: Evaluator) -> Advice | None:
    if not target.held_bytes:
        return None
    what = "close the other processes on the GPU" if target.index is not None else "detach the display"
    return Advice(
        title=what,
        flags="",
        effect="frees what they hold",
        peak_upper_bytes=now,
        change_bytes=0,
        fits=now <= evaluator.usable_bytes + target.held_bytes,
        tokens_per_second=None,
    )


def _smaller_model(evaluator: Evaluator, setup: TrainingSetup, now: int) -> Advice | None:
    """The largest smaller model of the family that fits with the same setup."""
    for summary in _family(evaluator.model):
        other = Evaluator(resolve_model(summary.id), evaluator.gpu, evaluator.usable_bytes)
        smaller = change(
            setup, f"{summary.id} instead", "the largest of its family that fits", model=summary.id
        )
        candidate = other.try_evaluate(smaller.setup)
        if candidate is not None and other.fits(candidate):
            return _advice(smaller, candidate, now, fits=True)
    return None


def _family(model: ModelSpec) -> list[ModelSummary]:
    """Smaller catalog models of the same name: those of the same generation first, the largest first."""
    name = re.match(r"[a-z]+", model.id)
    generation = model.id.rpartition("-")[0]
    smaller = [
        summary
        for summary in list_models()
        if name is not None
        and summary.id.startswith(name[0])
        and summary.parameter_count < model.parameter_count
    ]
    return sorted(smaller, key=lambda s: (s.id.rpartition("-")[0] != generation, -s.parameter_count))


def _spendings(setup: TrainingSetup) -> Iterator[tuple[Change, ...]]:
    """Groups of changes that need more memory; of each group the first that fits is wanted."""
    if setup.uses_lora:
        yield tuple(
            change(setup, f"rank {rank}", "a larger adapter", lora_r=rank, lora_alpha=None)
            for rank in LARGE_RANKS
            if rank > setup.lora_r
        )
    if setup.method == "qlora":
        unquantised = with_method(setup, "lora")
        yield (change_to(setup, "16-bit LoRA", "no quantisation of the base", unquantised),)


def _searched(
    evaluator: Evaluator, setup: TrainingSetup, effective: int, request: PlanRequest
) -> Candidate | None:
    """The fastest that fits with the changed setup as base, batched as that is."""
    fixed: dict[str, Any] = {name: getattr(setup, name) for name in KEPT} | request.fixed
    if evaluator.try_evaluate(setup) is None:
        return None
    result = search(setup, evaluator, effective_batch_size=effective, fixed=fixed, thorough=False)
    return None if result.chosen is None else result.chosen.candidate
