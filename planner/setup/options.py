"""Setups as a person types and tells them: each knob is an option of the command line, named as the knob."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping

from planner.setup.knob import Knob
from planner.setup.knobs import KNOBS
from planner.setup.training_setup import TrainingSetup


def option(name: str, value: object) -> list[str]:
    """The words that give a knob a value; true and false are an option without a value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list | tuple):
        return [f"--{flag}", ",".join(str(item) for item in value)]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return [f"--{flag}", str(value)]


def options(knobs: Mapping[str, object]) -> str:
    """What to type for knobs at these values."""
    return shlex.join(word for name, value in knobs.items() for word in option(name, value))


def differences(
    before: TrainingSetup,
    after: TrainingSetup,
    *,
    told: Collection[str] = (),
    knobs: tuple[Knob, ...] = KNOBS,
) -> tuple[str, ...]:
    """How one setup differs from another, a few words a knob; what is `told` elsewhere is left out.

    So is a knob that is back at its default because another one leaves it no meaning.
    """
    found = []
    for knob in knobs:
        value = getattr(after, knob.name)
        if knob.name in told or value == getattr(before, knob.name):
            continue
        meaningless = any(getattr(after, need.other) == need.other_than for need in knob.needs)
        if meaningless and value == knob.default:
            continue
        found.append(knob.in_words(value))
    return tuple(found)
