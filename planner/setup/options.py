"""Setups as a person types them: each knob is an option of the command line, named as the knob."""

from __future__ import annotations

from planner.setup.methods import with_method
from planner.setup.training_setup import FIELD_NAMES, TrainingSetup

# Null cannot be typed. "Checkpoint all layers" is typed as checkpointing itself; any other knob that becomes
# null does so with one that is told.
_TOLD_BY = {"checkpointed_layers": "gradient_checkpointing"}


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


def options_between(before: TrainingSetup, after: TrainingSetup) -> str:
    """What to type to come from one setup to another; what a changed method brings with it is not told."""
    words = []
    if after.method != before.method:
        words += option("method", after.method)
        before = with_method(before, after.method)
    told = set()
    for name in FIELD_NAMES:
        if getattr(before, name) == getattr(after, name):
            continue
        said = name if getattr(after, name) is not None else _TOLD_BY.get(name)
        if said is not None and said not in told:
            told.add(said)
            words += option(said, getattr(after, said))
    return " ".join(words)
