"""Asked: a request with what was looked up for it, what a plan for it chooses, and requests like it.

Everything that a plan says of another rank, method, model or card is the answer to a request of its own, so
that whoever types that request reads the same figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

from planner.base.errors import InputError
from planner.data.lengths import DatasetStats
from planner.gpus.target import GpuTarget, resolve_gpu
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.planning.choosing import Chosen, choose, effective_batch_size, policy_lengths, ranks
from planner.planning.ways import processes, ways
from planner.search import SPEED_TIE, finish_seconds
from planner.search.evaluator import Evaluator
from planner.search.lean import smallest_that_fits
from planner.setup.card_limits import BFLOAT16, CARD_LIMITS, refuse_on_card
from planner.setup.knob import KnobValue
from planner.setup.methods import refused_by
from planner.setup.request import PlanRequest
from planner.setup.run import Runs
from planner.setup.training_setup import TrainingSetup
from planner.throughput.epoch import Examples


class Asked:
    """A request, the card and the model that it names, and the lengths of its data where it has any.

    `runs` are those of the model that are known already: shapes, which no request changes. Estimates are
    each request's own, made as if nothing else had been asked.
    """

    def __init__(
        self,
        request: PlanRequest,
        target: GpuTarget,
        model: ModelSpec,
        stats: DatasetStats | None = None,
        *,
        runs: Runs | None = None,
    ) -> None:
        self.request = request
        self.target = target
        self.model = model
        self.stats = stats
        examples = None if stats is None else Examples(stats)
        self.evaluator = Evaluator(
            model,
            target.spec,
            target.usable_bytes,
            examples=examples,
            runs=runs,
            eight_bit=request.allow_8bit,
        )
        self._others: dict[PlanRequest, Asked] = {}

    @cached_property
    def chosen(self) -> Chosen:
        """What a plan for it chooses.

        Raises:
            InputError: the fixed knobs contradict each other, or ask for what the model does not have.
            NotModelledError: a fixed knob whose memory is not modelled.
        """
        if self.way is not self:
            return self.way.chosen
        return choose(self.request, self.target, self.evaluator, self.stats)

    @cached_property
    def ways(self) -> tuple[Asked, ...]:
        """The same with each way to use its GPUs, where it leaves that open; else itself."""
        found = ways(self.request, self.target)
        if found == (self.request,):
            return (self,)
        return tuple(self._way(request) for request in found)

    def _way(self, request: PlanRequest) -> Asked:
        """A way: one GPU is the one with most memory free, all leave what the fullest leaves."""
        target = self.target if request.fixed.get("num_processes") == 1 else self.target.of_all()
        return Asked(request, target, self.model, self.stats, runs=self.evaluator.runs)

    @cached_property
    def way(self) -> Asked:
        """The way whose plan is taken: that with the longest sequences, then the first to be done, then the
        one that needs least; itself where nothing is open.

        Raises:
            InputError: none can be asked.
        """
        if len(self.ways) == 1:
            return self.ways[0]
        answered = [way for way in self.ways if way.answer is not None]
        # Said by the way that has all that was asked for: with the knobs of none is anything wrong alone.
        return min(answered, key=_rank_among(answered)) if answered else self.ways[-1]

    @property
    def answer(self) -> Chosen | None:
        """The same; None for what cannot be asked, which a plan does not name."""
        try:
            return self.chosen
        except InputError:
            return None

    @property
    def base(self) -> TrainingSetup:
        """The setup from which a search for it starts, at the shortest of its lengths and the lowest of its
        ranks.
        """
        found = self.request.setup(**self.knobs, max_length=min(self.lengths))
        return found.replace(lora_r=ranks(found, self.request.fixed, self.model)[-1])

    @property
    def knobs(self) -> dict[str, Any]:
        """What follows from the card."""
        return {
            "dtype": self.target.spec.dtype,
            "num_processes": processes(self.request, self.target),
        }

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that it leaves open, the wished one first."""
        return policy_lengths(self.request, self.model, self.stats)

    @property
    def effective_batch_size(self) -> int:
        """Examples of an optimizer step."""
        return effective_batch_size(self.request, self.base.num_processes)

    def can_fit(self) -> bool:
        """Whether anything that a plan tries fits; cheaper than the plan where it is clear that none does."""
        if len(self.ways) > 1:
            return any(way.can_fit() for way in self.ways)
        try:
            found = smallest_that_fits(
                self.base,
                self.evaluator,
                effective_batch_size=self.effective_batch_size,
                fixed=self.request.fixed,
            )
        except InputError:
            return False
        return found is not None

    def with_knobs(self, knobs: Mapping[str, KnobValue], without: Collection[str] = ()) -> Asked:
        """The same with knobs fixed, and others left open.

        Raises:
            InputError: the request would contradict itself.
        """
        return self.with_request(self.request.without(*without).with_knobs(knobs))

    def with_request(self, request: PlanRequest) -> Asked:
        """Another request of the same card and model; of the same one the same."""
        if request not in self._others:
            other = Asked(request, self.target, self.model, self.stats, runs=self.evaluator.runs)
            self._others[request] = other
        return self._others[request]

    def refused_with(self, method: str) -> tuple[str, ...]:
        """Fixed knobs that have to go for a method."""
        fixed = self.request.fixed
        return tuple(name for name, value in refused_by(method).items() if fixed.get(name, value) != value)

    def of_model(self, name: str) -> Asked:
        """The same of another model of the catalog."""
        request = dataclasses.replace(self.request, model=name)
        model = resolve_model(name)
        runs = Runs(model, self.evaluator.runs.stack)
        return Asked(request, self.target, model, self.stats, runs=runs)

    def on_card(self, name: str) -> Asked:
        """The same of another card of the catalog.

        Raises:
            InputError: the card cannot run a fixed knob.
        """
        request = dataclasses.replace(self.request, gpu=name)
        target = resolve_gpu(name, display=request.display)
        refuse_on_card(request.fixed, target.spec, (*CARD_LIMITS, BFLOAT16))
        return Asked(request, target, self.model, self.stats, runs=self.evaluator.runs)

    def alone(self) -> Asked:
        """The same with all of the card's memory: without a display, and without other processes."""
        spec = self.target.spec
        free = min(spec.usable_bytes, self.target.usable_bytes + self.target.held_bytes)
        target = dataclasses.replace(self.target, usable_bytes=free, held_bytes=0)
        request = dataclasses.replace(self.request, display=False)
        return Asked(request, target, self.model, self.stats, runs=self.evaluator.runs)


def _rank_among(answered: list[Asked]) -> Callable[[Asked], tuple[bool, int, float, int]]:
    """What ways are ordered by; times within a tie of the best are alike, and so are those of equal ways."""

    def seconds(way: Asked) -> float:
        found = way.chosen
        return finish_seconds(found.tried.candidate, found.tokens) or float("inf")

    def length(way: Asked) -> int:
        return way.chosen.tried.candidate.setup.max_length

    fitting = [way for way in answered if way.chosen.fits]
    longest = max((length(way) for way in fitting), default=0)
    least = min((seconds(way) for way in fitting if length(way) == longest), default=0.0)

    def rank(way: Asked) -> tuple[bool, int, float, int]:
        found = way.chosen
        if not found.fits:
            return True, 0, float(found.tried.candidate.peak_upper_bytes), 0
        tied = seconds(way) <= least * (1 + SPEED_TIE)
        return False, -length(way), 0.0 if tied else seconds(way), found.tried.candidate.setup.num_processes

    return rank
