"""The verdict of a Plan as text: what both of its pages begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from planner.answers.plan import CardAdvice, Longest, Plan
from planner.text.choice import method_title
from planner.text.figures import gib, rate, say
from planner.text.page import Part
from planner.text.ways import way_sentences

if TYPE_CHECKING:
    from planner.text.figures import Out

CUT_TO_SAY = 0.05
"""Share of the data's tokens above which the verdict itself says that they are cut."""


def print_verdict(out: Out, plan: Plan) -> None:
    """Print whether it fits, what it needs, and what a person has to know before all else."""
    say(out, *_verdict(plan))
    for sentence in _sentences(plan):
        say(out, sentence)


def card_title(plan: Plan) -> str:
    """What the person asked for and the card that it means."""
    target = plan.gpu
    text = target.text.strip()
    return text if text.lower() == target.spec.id and target.count == 1 else f"{text} ({target.spec.id})"


def _verdict(plan: Plan) -> tuple[Part, Part]:
    word = ("FITS", "bold green") if plan.fits else ("DOES NOT FIT", "bold red")
    method = method_title(plan.setup)
    length = f"{plan.setup.max_length:,} tokens"
    one = "one of " if plan.gpu.count > plan.setup.num_processes else ""
    experts = ", experts in 4 bits," if plan.setup.experts == "4bit" else ""
    return word, f": {_model(plan)} with {method}{experts} at {length} on {one}{card_title(plan)}"


def _model(plan: Plan) -> str:
    """What was asked for, and what it was taken for where that is not the same."""
    asked, taken = plan.request.model, plan.model.id
    return asked if asked.rstrip("/").lower().endswith(taken.lower()) else f"{asked} ({taken})"


def _sentences(plan: Plan) -> Iterator[str]:
    memory, usable = plan.memory, plan.gpu.usable_bytes
    each = "Each GPU" if plan.setup.num_processes > 1 else "It"
    need = f"{each} needs {gib(memory.peak_bytes)}, at most {gib(memory.peak_upper_bytes)}, of the "
    need += f"{gib(usable)} that the card leaves: "
    yield need + (
        f"{gib(plan.headroom_bytes)} to spare." if plan.fits else f"{gib(-plan.headroom_bytes)} too much."
    )
    if plan.longest is not None:
        yield _longest(plan.longest)
    yield from way_sentences(plan)
    window = plan.model.max_position_embeddings
    if plan.setup.max_length > window:
        yield f"The model was made for {window:,} tokens: what it learns beyond them is not known."
    data = plan.data
    if data is not None and data.truncated_tokens >= CUT_TO_SAY * data.total_tokens:
        share = data.truncated_tokens / data.total_tokens
        longer = 100 - data.covered_percent
        yield f"It cuts {share:.0%} of the data's tokens: {longer:.0f}% of the examples are longer."
    if plan.fits:
        return
    yield from _cards(plan.smallest_cards)


_KINDS = {"desktop": "for a desktop", "rented": "to rent"}


def _cards(cards: Sequence[CardAdvice]) -> Iterator[str]:
    """The smallest card of each kind that takes it, in one sentence."""
    if not cards:
        yield "No card of the catalog takes it on one GPU."
        return
    named = [
        f"{one.gpu} {_KINDS.get(one.kind, '')} ({gib(one.usable_bytes)}, {one.max_length:,} tokens)"
        for one in cards
    ]
    yield f"Smallest {'card that takes' if len(cards) == 1 else 'cards that take'} it: {', '.join(named)}."


def _longest(longest: Longest) -> str:
    ends = "the model's own window" if longest.reaches_model_limit else "more do not fit"
    speed = "" if longest.tokens_per_second is None else f"{rate(longest.tokens_per_second)} tokens/s, "
    plan = f"--max-length {longest.max_length}"
    return f"Longest: {longest.max_length:,} tokens, {ends} ({speed}{plan})."
