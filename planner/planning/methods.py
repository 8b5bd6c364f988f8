"""Methods beside each other: what a plan answers for each, and the smallest cards that take it."""

from __future__ import annotations

from planner.answers.plan import MethodFigures
from planner.base.errors import InputError
from planner.planning.advice import gain, other_knobs
from planner.planning.asked import Asked
from planner.planning.other_cards import fitting_cards
from planner.planning.savings import to_method
from planner.search.cards import DESKTOP, RENTED, smallest_first
from planner.setup.training_setup import METHODS


def method_figures(asked: Asked) -> tuple[MethodFigures, ...]:
    """A row a method; none for a method that the model or the fixed knobs do not allow."""
    return tuple(row for method in METHODS if (row := _figures(asked, method)) is not None)


def _figures(asked: Asked, method: str) -> MethodFigures | None:
    change = to_method(asked, method, method, "")
    there = asked
    if method != asked.chosen.tried.candidate.setup.method:
        try:
            there = asked.with_request(change.of(asked.request))
        except InputError:
            return None
    found = there.answer
    if found is None:
        return None
    best = found.tried.candidate
    cards = {one.kind: one for one in fitting_cards(there, best.setup.max_length)}
    smallest = smallest_first(list(cards.values()))
    names = {kind: one.gpu.id for kind, one in cards.items()}
    return MethodFigures(
        method=method,
        weights_bytes=best.memory.weights_bytes,
        allocated_bytes=best.memory.allocated_bytes,
        process_bytes=best.memory.process_bytes,
        peak_upper_bytes=best.peak_upper_bytes,
        fits=found.fits,
        tokens_per_second=None if best.speed is None else best.speed.tokens_per_second,
        smallest_gpu=None if smallest is None else smallest.gpu.id,
        max_length=best.setup.max_length,
        flags=change.flags,
        without=change.left_out(asked.request),
        changes=() if there is asked else other_knobs(asked, found, change.told | {"max_length"}),
        faster=None if there is asked else gain(asked, found),
        desktop_card=names.get(DESKTOP),
        rented_card=names.get(RENTED),
    )
