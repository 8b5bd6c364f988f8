"""The planner's advice and its automatic choice for a sizing, as setups that can be applied.

Made for a worker thread: a search takes longer than a keystroke may.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.tui import knobs
from launcher.tui.cards import Card
from launcher.tui.sizing import Sizing, Verdict, on_all_cards
from launcher.tui.text import gib
from planner.answers.plan import Advice, FrontierPoint
from planner.base.errors import InputError
from planner.models.spec import ModelSpec
from planner.planning.advice import make_it_fit, use_what_is_left
from planner.search import TOKENS, Tried, search
from planner.search.evaluator import Candidate, Evaluator
from planner.search.frontier import around_the_chosen, frontier
from planner.setup.knobs import KNOBS
from planner.setup.methods import refused_by
from planner.setup.request import PlanRequest
from planner.setup.training_setup import FIELD_NAMES, TrainingSetup

# An automatic choice that brings less speed than this is not worth a line.
_LEAST_GAIN = 0.02
_KINDS = {knob.name: knob.kind for knob in KNOBS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
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
class Advised:
    """What was worked out for a sizing: changes that help, and the frontier of the planner's search."""

    changes: tuple[Change, ...] = ()
    points: tuple[FrontierPoint, ...] = ()


def work_out(sizing: Sizing) -> Advised:
    """Changes and frontier at the sizing's length, method, adapter and effective batch.

    Raises:
        InputError: the effective batch cannot be had in another way.
    """
    evaluator = Evaluator(sizing.model, sizing.card.spec, sizing.card.usable_bytes)
    return Advised(changes=changes(sizing, evaluator), points=points(sizing, evaluator))


def changes(sizing: Sizing, evaluator: Evaluator) -> tuple[Change, ...]:
    """What makes the setup fit or, when it fits, what uses the memory that is left."""
    if sizing.verdict is not Verdict.FITS:
        found = make_it_fit(evaluator, sizing.setup, sizing.card.target)
        return tuple(_change(one, apply_flags(sizing.setup, one.flags)) for one in found)
    request = PlanRequest(model=sizing.setup.model)
    found = use_what_is_left(evaluator, sizing.setup, request)
    rest = tuple(change for one in found if (change := _searched(evaluator, sizing, one)) is not None)
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


def apply_flags(setup: TrainingSetup, flags: str) -> TrainingSetup | None:
    """The setup that flags such as "--lora-r 32 --no-use-dora" lead to; None when there are none.

    Raises:
        InputError: a flag names no field of a setup.
    """
    values: dict[str, Any] = {}
    words = shlex.split(flags)
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if words and not words[0].startswith("--"):
            values[name] = _value(name, words.pop(0))
        elif name.removeprefix("no_") in _KINDS and name.startswith("no_"):
            values[name.removeprefix("no_")] = False
        else:
            values[name] = True
    unknown = [name for name in values if name not in FIELD_NAMES]
    if unknown:
        raise InputError(f"advice names what is no knob: {', '.join(unknown)}")
    if not values:
        return None
    if values.get("gradient_checkpointing"):
        values.update(checkpointed_layers=None, activation_memory_budget=None)
    if "lora_r" in values:
        values["lora_alpha"] = None
    if "method" in values:
        values |= refused_by(values["method"])
    return setup.replace(**values)


def _value(name: str, text: str) -> object:
    kind = _KINDS.get(name)
    if kind == "int":
        return int(text)
    return float(text) if kind == "float" else text


def _change(advice: Advice, setup: TrainingSetup | None) -> Change:
    return Change(
        title=advice.title,
        effect=advice.effect,
        peak_upper_bytes=advice.peak_upper_bytes,
        fits=advice.fits,
        tokens_per_second=advice.tokens_per_second,
        setup=setup,
    )


def _searched(evaluator: Evaluator, sizing: Sizing, one: Advice) -> Change | None:
    """A change with the fastest way to run it, which is told where it is another one than now."""
    best = _fastest(evaluator, apply_flags(sizing.searched_from, one.flags))
    if best is None:
        return None
    told = _change(one, best.setup)
    as_now = best.setup == apply_flags(sizing.setup, one.flags)
    return told if as_now else replace(told, effect=_ways(best.setup))


def _faster(evaluator: Evaluator, sizing: Sizing) -> Change | None:
    best = _fastest(evaluator, sizing.searched_from)
    now = None if sizing.step is None else sizing.step.tokens_per_second
    if best is None or now is None or best.tokens_per_second is None:
        return None
    if best.tokens_per_second < now * (1 + _LEAST_GAIN):
        return None
    return Change(
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


def _fastest(evaluator: Evaluator, base: TrainingSetup | None) -> Candidate | None:
    if base is None:
        return None
    result = search(base, evaluator, effective_batch_size=base.effective_batch_size, fixed={})
    return None if result.chosen is None else result.chosen.candidate
