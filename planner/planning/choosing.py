"""What a request leaves open beside the search: GPUs, effective batch, length and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.base.values import dataclass
from planner.data.lengths import DatasetStats
from planner.gpus.target import GpuTarget
from planner.memory.refusals import refuse_dropout_on_experts
from planner.models.spec import ModelSpec
from planner.planning.ways import processes
from planner.search import TOKENS, SearchResult, Tried, finish_seconds, search
from planner.search.evaluator import Evaluator
from planner.search.lean import longest_that_fits
from planner.setup import defaults
from planner.setup.request import DEFAULT_EFFECTIVE_BATCH_SIZE, DEFAULT_RANK, PlanRequest
from planner.setup.trained import adapted
from planner.setup.training_setup import TrainingSetup

EXPERT_RANKS = (8, 4)
"""Tried where experts are adapted and nothing fits at the usual rank: rank 16 on all experts of Qwen3-30B-A3B
is 1.0 billion trained parameters, which take 5.6 GiB."""
RANK_MAY_COST = 1.02
"""A higher rank is taken where the run takes at most so many times as long with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What the search over lengths and ranks came to.

    `effective_batch_size` is what was wished, in examples; `tokens` what the run was taken to go through;
    `wished_rank` the rank that the data asks for.
    """

    tried: Tried
    result: SearchResult
    fits: bool
    effective_batch_size: int
    tokens: int
    wished_rank: int


def choose(
    request: PlanRequest, target: GpuTarget, evaluator: Evaluator, stats: DatasetStats | None
) -> Chosen:
    """The first length at which something fits, with the fastest that does; else the smallest of all.

    Raises:
        InputError: the fixed knobs contradict each other, or ask for what the model does not have.
        NotModelledError: a fixed knob whose memory is not modelled.
    """
    knobs: dict[str, Any] = {
        "dtype": target.spec.dtype,
        "num_processes": processes(request, target),
    }
    wished, *shorter = policy_lengths(request, evaluator.model, stats)
    base = request.setup(**knobs, max_length=wished)
    refuse_dropout_on_experts(evaluator.run(base))
    found = search_ranks(base, request, evaluator)
    if not found.fits and shorter and stats is not None:
        # As much of the examples as fits.
        longest = longest_that_fits(
            base.replace(lora_r=ranks(base, request.fixed, evaluator.model)[-1]),
            evaluator,
            effective_batch_size=found.effective_batch_size,
            fixed=request.fixed,
            start_length=defaults.SHORTEST_LENGTH,
            limit=wished,
        )
        shorter = [longest] if longest is not None else shorter[-1:]
    for length in shorter:
        if found.fits:
            break
        found = search_ranks(request.setup(**knobs, max_length=length), request, evaluator)
    if found.fits:
        return _raise_rank(found, request, evaluator, stats)
    smallest_tried = _smallest(found.result, evaluator)
    return replace(found, tried=smallest_tried, fits=smallest_tried.fits)


def ranks(base: TrainingSetup, fixed: Mapping[str, Any], model: ModelSpec) -> tuple[int, ...]:
    """The ranks at which something may fit, the usual one first: lower ones where experts are adapted, whose
    adapters, of all experts together, may be larger than what else a step needs.

    Raises:
        FieldError: target_modules names a module that the model does not have.
    """
    usual = (base.lora_r,)
    if "lora_r" in fixed or not base.uses_lora:
        return usual
    experts = adapted(model, base.target_modules).experts
    return usual + tuple(rank for rank in EXPERT_RANKS if rank < base.lora_r) if experts else usual


def search_ranks(base: TrainingSetup, request: PlanRequest, evaluator: Evaluator) -> Chosen:
    """The search at the highest of the ranks at which something fits; at the lowest where nothing does."""
    for rank in ranks(base, request.fixed, evaluator.model):
        found = search_at(base.replace(lora_r=rank), request, evaluator)
        if found.fits:
            break
    return replace(found, wished_rank=base.lora_r)


def search_at(base: TrainingSetup, request: PlanRequest, evaluator: Evaluator) -> Chosen:
    """The search with one length and rank: what a plan for that length finds. The chosen one is a stand-in
    where nothing fits.
    """
    effective = effective_batch_size(request, base.num_processes)
    examples = evaluator.examples
    tokens = TOKENS
    if examples is not None:
        tokens = round(examples.lengths(base.max_length).tokens * epochs(request))
    result = search(
        base,
        evaluator,
        effective_batch_size=effective,
        fixed=request.fixed,
        confirm=True,
        tokens=tokens,
    )
    return Chosen(
        tried=result.smallest if result.chosen is None else result.chosen,
        result=result,
        fits=result.chosen is not None,
        effective_batch_size=effective,
        tokens=tokens,
        wished_rank=base.lora_r,
    )


def _raise_rank(
    found: Chosen, request: PlanRequest, evaluator: Evaluator, stats: DatasetStats | None
) -> Chosen:
    """The same with the highest rank that the data asks for and that costs hardly any time."""
    setup = found.tried.candidate.setup
    if stats is None or not setup.uses_lora or "lora_r" in request.fixed or setup.lora_r < found.wished_rank:
        return found
    ranks = defaults.ranks(stats.loss_tokens, evaluator.run(setup).trained.elements, DEFAULT_RANK)
    now = finish_seconds(found.tried.candidate, found.tokens)
    for rank in ranks:
        higher = search_at(
            request.setup(
                dtype=setup.dtype,
                num_processes=setup.num_processes,
                max_length=setup.max_length,
                lora_r=rank,
            ),
            request,
            evaluator,
        )
        then = finish_seconds(higher.tried.candidate, found.tokens) if higher.fits else None
        if now is not None and then is not None and then <= RANK_MAY_COST * now:
            return replace(higher, wished_rank=ranks[0])
    return replace(found, wished_rank=ranks[0] if ranks else setup.lora_r)


def policy_lengths(request: PlanRequest, model: ModelSpec, stats: DatasetStats | None) -> tuple[int, ...]:
    """Lengths to try for a request, the wished one first."""
    return defaults.lengths(model, request.fixed.get("max_length"), stats)


def effective_batch_size(request: PlanRequest, num_processes: int) -> int:
    """The effective batch asked for; else what fixed knobs give; else 16 or the nearest they allow."""
    if request.effective_batch_size is not None:
        return request.effective_batch_size
    micro = request.fixed.get("per_device_train_batch_size")
    accumulation = request.fixed.get("gradient_accumulation_steps")
    unit = num_processes
    for value in (micro, accumulation):
        unit *= value if isinstance(value, int) else 1
    if isinstance(micro, int) and isinstance(accumulation, int):
        return unit
    return max(1, round(DEFAULT_EFFECTIVE_BATCH_SIZE / unit)) * unit


def _smallest(result: SearchResult, evaluator: Evaluator) -> Tried:
    """What needs least by the allocator's replay: the smallest of eager and of compiled layers."""
    found = []
    for kind in sorted({one.candidate.setup.compile for one in result.tried}):
        tried = tuple(one for one in result.tried if one.candidate.setup.compile == kind)
        one = SearchResult(tried=tried, chosen=None).smallest
        candidate = evaluator.confirm(one.candidate.setup, whole=True)
        found.append(Tried(strategy=one.strategy, candidate=candidate, fits=evaluator.fits(candidate)))
    return min(found, key=lambda one: one.candidate.peak_upper_bytes)


def epochs(request: PlanRequest) -> float:
    """Passes over the data: as asked for, or the usual number."""
    return defaults.EPOCHS if request.num_train_epochs is None else float(request.num_train_epochs)
