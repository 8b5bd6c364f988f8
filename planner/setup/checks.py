"""What checks a setup's knobs, made once from their rows: each value by itself, then what values need."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from operator import attrgetter, itemgetter
from typing import Any

from planner.base.errors import InputError
from planner.setup.knob import METHODS, Knob

SetupCheck = Callable[[Any], None]
"""Raises FieldError or InputError where a setup, which has the knobs as attributes, is not accepted."""
_TYPES: dict[str, type] = {
    "choice": str,
    "int": int,
    "float": float,
    "bool": bool,
    "names": str,
    "indices": str,
}
_NO_DEFAULT = object()


def setup_check(knobs: tuple[Knob, ...]) -> SetupCheck:
    """What checks a setup's knobs: values in the order of the rows, then what they need, the method first.

    A plan makes hundreds of setups, an `estimate` of a file tens of thousands, and nearly all of their values
    are the very default, which a row has checked and which needs nothing. Of the others what is quick to
    accept is accepted here, and the rest left to the knob's own check, which has the message.
    """
    values_of = attrgetter(*(knob.name for knob in knobs))
    defaults = tuple(_NO_DEFAULT if knob.required else knob.default for knob in knobs)
    places = {knob.name: place for place, knob in enumerate(knobs)}
    rows = tuple((_TYPES[knob.kind], _quick(knob), knob.check(), _needs(knob, places)) for knob in knobs)

    def check(setup: Any) -> None:
        values = values_of(setup)
        needs: list[_Need] = []
        for row, default, value in zip(rows, defaults, values, strict=True):
            if value is not default:
                kind, accepted, accept, own = row
                if type(value) is not kind or value not in accepted:
                    accept(value)
                if own:
                    needs += own
        if needs:
            unmet = [one for one in needs if values[one[1]] in one[2] and values[one[3]] not in one[4]]
            if unmet:
                _, other, _, place, _, message = min(unmet, key=itemgetter(0))
                raise InputError(message.format(value=values[place], other=values[other]))

    return check


class _Between:
    """Numbers from one to another."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high

    def __contains__(self, value: object) -> bool:
        return isinstance(value, float) and self._low <= value <= self._high


def _quick(knob: Knob) -> Container[object]:
    """Values of the knob's own type that it accepts, as far as they can be told at once."""
    if knob.bounds is None:
        return frozenset((True, False)) if knob.kind == "bool" else frozenset(knob.choices)
    low, high = knob.bounds
    return range(int(low), int(high) + 1) if knob.kind == "int" else _Between(low, high)


# Its rank among what is unmet; the place of another knob's value and what that may not be; the place of the
# knob's own and which values need nothing of the other; the message with {value} and {other}.
_Need = tuple[int, int, tuple[object, ...], int, tuple[object, ...], str]


def _needs(knob: Knob, places: Mapping[str, int]) -> tuple[_Need, ...]:
    """What values of a knob need: a method that uses them, and what its row says."""
    own, free = places[knob.name], (knob.default, *knob.free)
    found: list[_Need] = []
    refusing = tuple(method for method in METHODS if method not in knob.methods)
    if refusing and not knob.kept:
        methods = " and ".join(knob.methods)
        message = f"{knob.name} applies to {methods}, but method is {{other}}"
        found.append((0, places["method"], refusing, own, free, message))
    for need in knob.needs:
        found.append((1, places[need.other], (need.other_than,), own, free, need.message(knob.name)))
    return tuple(found)
