"""The planner's advice and its automatic choice for a sizing, as setups that can be applied.

Made for a worker thread: a search takes longer than a keystroke may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from launcher.tui import knobs
from launcher.tui.cards import Card
from launcher.tui.sizing import Sizing, Verdict, on_all_cards
from launcher.tui.text import gib
from planner.answers.plan import Advice, FrontierPoint
from planner.base.errors import InputError
from planner.models.spec import ModelSpec
from planner.planning.advice import make_it_fit, use_what_is_left
from planner.planning.choosing import choose
from planner.search import TOKENS, Tried, search
from planner.search.evaluator import Candidate, Evaluator
from planner.search.frontier import around_the_chosen, frontier
from planner.setup.request import PlanRequest, make_request
from planner.setup.training_setup import TrainingSetup

# An automatic choice that brings less speed than this is not worth a line.
_LEAST_GAIN = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A change that helps. `setup` is what it leads to, None for what no knob can do (closing a program)."""

    title: str
    effect: str
    peak_upper_bytes: int
    fits: bool
    tokens_per_second: float | None
    setup: TrainingSetup | None


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

    offers: tuple[Offer, ...] = ()
    points: tuple[FrontierPoint, ...] = ()
    refusal: str = ""


def work_out(sizing: Sizing) -> Suggestions:
    """Changes and frontier at the sizing's length, method, adapter and effective batch.

    Raises:
        InputError: the effective batch cannot be had in another way.
    """
    evaluator = Evaluator(sizing.model, sizing.card.spec, sizing.card.usable_bytes)
    return Suggestions(offers=offers(sizing, evaluator), points=points(sizing, evaluator))


def offers(sizing: Sizing, evaluator: Evaluator) -> tuple[Offer, ...]:
    """What makes the setup fit or, when it fits, what uses the memory that is left."""
    if sizing.verdict is not Verdict.FITS:
        found = make_it_fit(evaluator, sizing.setup, sizing.card.target)
        return tuple(_offer(one, one.setup) for one in found)
    request = PlanRequest(model=sizing.setup.model)
    found = use_what_is_left(evaluator, sizing.setup, request)
    rest = tuple(offer for one in found if (offer := _searched(evaluator, sizing, one)) is not None)
    faster = _faster(evaluator, sizing)
    return rest if faster is None else (faster, *rest)


def points(sizing: Sizing, evaluator: Evaluator) -> tuple[FrontierPoint, ...]:
    """The frontier of what the planner would try in place of the setup, around what it would choose."""
    setup, base = sizing.setup, sizing.searched_from
    result = search(base, evaluator, effective_batch_size=base.effective_batch_size, fixed={}, confirm=True)
    tried = [
        replace(one, candidate=evaluator.confirm(setup)) if _is(one, setup) else one for one in result.tried
    ]
    chosen = result.chosen or result.smallest
    chosen = next(one for one in tried if _is(one, chosen.candidate.setup))
    return around_the_chosen(frontier(tried, chosen, evaluator, tokens=TOKENS))


def _is(one: Tried, setup: TrainingSetup) -> bool:
    return one.candidate.setup == setup


def automatic_choice(name: str, model: ModelSpec, card: Card, texts: Mapping[str, str]) -> Choice:
    """The fastest setup that fits, at the knobs' length, method, adapter and effective batch.

    The dtype is what the card computes in; the optimizer in `texts` is the one that was asked for.

    Raises:
        InputError: a knob is not valid, or nothing fits.
    """
    base = on_all_cards(knobs.to_setup(name, {**texts, "dtype": card.spec.dtype}, {}), card)
    evaluator = Evaluator(model, card.spec, card.usable_bytes)
    result = search(base, evaluator, effective_batch_size=base.effective_batch_size, fixed={}, confirm=True)
    if result.chosen is None:
        needed = result.smallest.candidate.peak_upper_bytes
        raise InputError(
            f"nothing fits at {base.max_length:,} tokens; the smallest setup needs up to {gib(needed)}"
        )
    setup = result.chosen.candidate.setup
    return Choice(
        setup=setup,
        reason=f"{result.chosen.strategy}, micro-batch {setup.per_device_train_batch_size} x "
        f"{setup.gradient_accumulation_steps}: the fastest of {len(result.tried)} tried that fits",
    )


def opening_choice(name: str, model: ModelSpec, card: Card) -> TrainingSetup:
    """The setup that `plan` chooses for a model and a card by itself: the smallest where nothing fits.

    Raises:
        InputError: the model's memory is not modelled.
    """
    request = make_request(name, gpu=card.argument)
    evaluator = Evaluator(model, card.spec, card.usable_bytes)
    return choose(request, card.target, evaluator, None).tried.candidate.setup


def _offer(advice: Advice, setup: TrainingSetup | None) -> Offer:
    return Offer(
        title=advice.title,
        effect=advice.effect,
        peak_upper_bytes=advice.peak_upper_bytes,
        fits=advice.fits,
        tokens_per_second=advice.tokens_per_second,
        setup=setup,
    )


def _searched(evaluator: Evaluator, sizing: Sizing, one: Advice) -> Offer | None:
    """A change with the fastest way to run it, which is told where it is another one than now."""
    if one.setup is None:
        return None
    best = _fastest(evaluator, one.setup.replace(optim=sizing.asked_optim))
    if best is None:
        return None
    told = _offer(one, best.setup)
    return told if best.setup == one.setup else replace(told, effect=_ways(best.setup))


def _faster(evaluator: Evaluator, sizing: Sizing) -> Offer | None:
    best = _fastest(evaluator, sizing.searched_from)
    now = None if sizing.step is None else sizing.step.tokens_per_second
    if best is None or now is None or best.tokens_per_second is None:
        return None
    if best.tokens_per_second < now * (1 + _LEAST_GAIN):
        return None
    return Offer(
        title=_ways(best.setup),
        effect="the automatic choice",
        peak_upper_bytes=best.peak_upper_bytes,
        fits=True,
        tokens_per_second=best.tokens_per_second,
        setup=best.setup,
    )


def _ways(setup: TrainingSetup) -> str:
    """How layers are run, in the words of the knobs, and the batch."""
    ways = [
        *["compiled"] * (setup.compile != "none"),
        "checkpointing" if setup.gradient_checkpointing else "no checkpointing",
        *["offloading"] * setup.activation_offloading,
        f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps}",
    ]
    return ", ".join(ways)


def _fastest(evaluator: Evaluator, base: TrainingSetup) -> Candidate | None:
    result = search(base, evaluator, effective_batch_size=base.effective_batch_size, fixed={})
    return None if result.chosen is None else result.chosen.candidate
