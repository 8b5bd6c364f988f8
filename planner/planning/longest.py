"""The longest context of a plan: how long sequences may be on its card, and how they would then be run."""

from __future__ import annotations

from typing import Any

from planner.answers.plan import Longest
from planner.gpus.target import GpuTarget
from planner.planning.choosing import effective_batch_size, ranks, search_ranks
from planner.planning.ways import processes, ways
from planner.search.evaluator import Evaluator
from planner.search.lean import longest_that_fits
from planner.setup import defaults
from planner.setup.request import PlanRequest


def longest_context(request: PlanRequest, target: GpuTarget, evaluator: Evaluator) -> Longest | None:
    """The longest sequences for which a plan with the request's other knobs fits; None where none does.

    Of sequences that are full, whatever the data's lengths. What runs at that length, and how fast, is what a
    plan for it finds.

    Raises:
        InputError: the fixed knobs contradict each other.
    """
    found = [_longest(way, target, evaluator) for way in ways(request, target)]
    return max((one for one in found if one is not None), key=_how_long, default=None)


def _how_long(one: Longest) -> tuple[int, float]:
    return one.max_length, one.tokens_per_second or 0.0


def _longest(request: PlanRequest, target: GpuTarget, evaluator: Evaluator) -> Longest | None:
    full = Evaluator(evaluator.model, evaluator.gpu, evaluator.usable_bytes, runs=evaluator.runs)
    num_processes = processes(request, target)
    knobs: dict[str, Any] = {"dtype": target.spec.dtype, "num_processes": num_processes}
    limit = evaluator.model.max_position_embeddings
    shortest = min(defaults.SHORTEST_LENGTH, limit)
    fixed = {name: value for name, value in request.fixed.items() if name != "max_length"}
    open_ended = request.without("max_length")
    base = open_ended.setup(**knobs, max_length=shortest)
    lowest = ranks(base, open_ended.fixed, evaluator.model)[-1]
    length = longest_that_fits(
        base.replace(lora_r=lowest),
        full,
        effective_batch_size=effective_batch_size(request, num_processes),
        fixed=fixed,
        start_length=shortest,
    )
    if length is None:
        return None
    found = search_ranks(base.replace(max_length=length), open_ended, full).tried.candidate
    return Longest(
        max_length=length,
        peak_upper_bytes=found.peak_upper_bytes,
        tokens_per_second=found.tokens_per_second,
        reaches_model_limit=length == limit,
        setup=found.setup,
    )
