"""The planner's advice and its automatic choice for a sizing, as setups that can be applied.

Made for a worker thread: a search takes longer than a keystroke may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.tui import knobs
from launcher.tui.cards import Card
from launcher.tui.command_line import asked_of, request_of
from launcher.tui.sizing import NO_WISHES, Sizing, Wishes, evaluator_of, ways
from launcher.tui.text import gib
from planner.answers.plan import Advice, FrontierPoint
from planner.base.errors import InputError
from planner.models.spec import ModelSpec
from planner.planning.advice import advice
from planner.planning.asked import Asked
from planner.search import TOKENS, SearchResult, fastest, search
from planner.search.evaluator import Evaluator
from planner.search.frontier import around_the_chosen, frontier
from planner.setup import defaults
from planner.setup.request import make_request
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The setup that the planner picks, and in a line why."""

    setup: TrainingSetup
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestions:
    """What was worked out for a sizing: changes that help, and the frontier of the planner's search; or why
    neither could be.
    """

    offers: tuple[Advice, ...] = ()
    points: tuple[FrontierPoint, ...] = ()
    refusal: str = ""


def work_out(sizing: Sizing, overtaken: Callable[[], bool] = lambda: False) -> Suggestions:
    """Changes to exactly this setup, and the frontier at its length, method, adapter and effective batch.

    Raises:
        InputError: the effective batch cannot be had in another way.
    """
    found = offers(sizing)
    return Suggestions(offers=found, points=() if overtaken() else points(sizing))


def offers(sizing: Sizing) -> tuple[Advice, ...]:
    """What makes the setup fit or, when it fits, what uses the memory that is left: what `plan` advises where
    every knob is fixed.
    """
    data = sizing.wishes.data
    stats = None if data is None else data.stats
    return advice(Asked(request_of(sizing), sizing.card.target, sizing.model, stats))


def points(sizing: Sizing) -> tuple[FrontierPoint, ...]:
    """The frontier of what the planner would try in place of the setup, around what it would choose."""
    evaluator = evaluator_of(sizing.model, sizing.card, sizing.wishes)
    base = sizing.searched_from
    tokens = _tokens(base, evaluator, sizing.wishes)
    result = _search(base, evaluator, base.effective_batch_size, tokens)
    chosen = result.chosen or result.smallest
    return around_the_chosen(frontier(result.tried, chosen, evaluator, tokens=tokens))


def _tokens(base: TrainingSetup, evaluator: Evaluator, wishes: Wishes) -> int:
    """Tokens of the run that a search is for: those of the data, all passes over it."""
    if evaluator.examples is None:
        return TOKENS
    passes = defaults.EPOCHS if wishes.num_train_epochs is None else wishes.num_train_epochs
    return round(evaluator.examples.lengths(base.max_length).tokens * passes)


def automatic_choice(
    name: str, model: ModelSpec, card: Card, texts: Mapping[str, str], wishes: Wishes = NO_WISHES
) -> Choice:
    """The fastest setup that fits, at the knobs' length, method, adapter and effective batch.

    The dtype is what the card computes in; the optimizer in `texts` is the one that was asked for.

    Raises:
        InputError: a knob is not valid, or nothing fits.
    """
    base = knobs.to_setup(name, {**texts, "dtype": card.spec.dtype}, {})
    tokens = _tokens(base, evaluator_of(model, card, wishes), wishes)
    results = []
    for way in ways(base, card):
        evaluator = evaluator_of(model, card.shared_by(way.num_processes), wishes)
        try:
            effective = base.effective_batch_size * card.target.count
            results.append(_search(way, evaluator, effective, tokens))
        except InputError:
            if card.target.count == 1:
                raise
    chosen = fastest([one.chosen for one in results if one.chosen is not None], tokens)
    if chosen is None:
        needed = min(result.smallest.candidate.peak_upper_bytes for result in results)
        raise InputError(
            f"nothing fits at {base.max_length:,} tokens; the smallest setup needs up to {gib(needed)}"
        )
    result = next(one for one in results if one.chosen is chosen)
    setup = chosen.candidate.setup
    return Choice(
        setup=setup,
        reason=f"{chosen.strategy}, micro-batch {setup.per_device_train_batch_size} x "
        f"{setup.gradient_accumulation_steps}: the fastest of {len(result.tried)} tried that fits",
    )


def _search(base: TrainingSetup, evaluator: Evaluator, effective: int, tokens: int) -> SearchResult:
    return search(base, evaluator, effective_batch_size=effective, fixed={}, confirm=True, tokens=tokens)


def opening_choice(name: str, model: ModelSpec, card: Card, wishes: Wishes = NO_WISHES) -> TrainingSetup:
    """The setup that `plan` chooses for a model, a card and data by itself: the smallest where nothing fits.

    Raises:
        InputError: the model's memory is not modelled.
    """
    stats = None if wishes.data is None else wishes.data.stats
    request = make_request(name, **asked_of(card, wishes))
    return Asked(request, card.target, model, stats).chosen.tried.candidate.setup
