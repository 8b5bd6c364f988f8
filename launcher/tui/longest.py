"""How long sequences may be with a sizing's model, card, method and adapter: what `plan --longest` says where
the knobs that a search chooses are left to it. Made for a worker thread, which a change overtakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.tui.command_line import open_request
from launcher.tui.sizing import Sizing
from planner.answers.plan import Longest
from planner.base.errors import InputError
from planner.gpus.target import GpuTarget
from planner.models.spec import ModelSpec
from planner.planning.longest import longest_context
from planner.search.evaluator import Evaluator
from planner.setup.request import PlanRequest
from planner.setup.run import Runs, TrainingRun
from planner.setup.training_setup import TrainingSetup


class OvertakenError(Exception):
    """What is worked out is not wanted any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongestQuestion:
    """What decides how long sequences may be: most changes of knobs ask the same."""

    request: PlanRequest
    target: GpuTarget


@dataclass(frozen=True, kw_only=True, slots=True)
class LongestAnswer:
    """The longest sequences that fit; null where none do or, with a `refusal`, where none is known."""

    question: LongestQuestion
    longest: Longest | None
    refusal: str = ""


class WantedRuns(Runs):
    """Runs of a model until they are overtaken: each estimate, of milliseconds, asks for one."""

    def __init__(self, model: ModelSpec, overtaken: Callable[[], bool]) -> None:
        super().__init__(model)
        self._overtaken = overtaken

    def of(self, setup: TrainingSetup, *, padded: bool = False) -> TrainingRun:
        """A setup's run.

        Raises:
            OvertakenError: nobody waits for it.
        """
        if self._overtaken():
            raise OvertakenError
        return super().of(setup, padded=padded)


def question_of(sizing: Sizing) -> LongestQuestion:
    """The question of a sizing, the same whatever its length, its batches and how its layers are run."""
    return LongestQuestion(request=open_request(sizing), target=sizing.card.target)


def find_longest(sizing: Sizing, overtaken: Callable[[], bool] = lambda: False) -> LongestAnswer:
    """Look for the longest sequences.

    Raises:
        OvertakenError: `overtaken` said so.
    """
    question, card = question_of(sizing), sizing.card
    runs = WantedRuns(sizing.model, overtaken)
    evaluator = Evaluator(sizing.model, card.spec, card.usable_bytes, runs=runs)
    try:
        found = longest_context(question.request, question.target, evaluator)
    except InputError as error:
        return LongestAnswer(question=question, longest=None, refusal=str(error))
    return LongestAnswer(question=question, longest=found)
