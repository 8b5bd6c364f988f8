"""Every TrainingSetup key as a command-line option, named as TRL, PEFT and bitsandbytes name it."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from planner.base.errors import FieldError
from planner.commands.program import StoreOnce, SwitchOnce, real_number, whole_number
from planner.setup.knob import Knob, KnobValue, plain
from planner.setup.knobs import KNOBS


def add_knobs(parser: argparse.ArgumentParser, knobs: tuple[Knob, ...] = KNOBS) -> None:
    """Add one option for each knob."""
    group = parser.add_argument_group("knobs", "What is given here is fixed; the rest is chosen.")
    for knob in knobs:
        name, shown = knob.name, option_help(knob)
        flag = "--" + name.replace("_", "-")
        if knob.kind == "bool":
            group.add_argument(flag, dest=name, action=SwitchOnce, default=None, help=shown)
        elif knob.kind == "choice":
            group.add_argument(
                flag,
                dest=name,
                action=StoreOnce,
                type=partial(_word, knob),
                choices=knob.choices,
                help=shown,
                metavar="NAME",
            )
        else:
            kind, metavar = _parsed(knob)
            group.add_argument(flag, dest=name, action=StoreOnce, type=kind, help=shown, metavar=metavar)


def _parsed(knob: Knob) -> tuple[Any, str]:
    """What makes a value of an option's text, and what that text is called."""
    parsed: dict[str, tuple[Any, str]] = {
        "int": (whole_number, "N"),
        "float": (real_number, "X"),
        "names": (partial(_names, knob), "NAMES"),
        "indices": (partial(_indices, knob), "IDS"),
    }
    return parsed[knob.kind]


def given_knobs(
    args: argparse.Namespace, knobs: tuple[Knob, ...] = KNOBS
) -> tuple[tuple[str, KnobValue], ...]:
    """The knobs that were given, in the contract's order."""
    return tuple((knob.name, value) for knob in knobs if (value := getattr(args, knob.name)) is not None)


def option_help(knob: Knob) -> str:
    """What an option is, what is taken without it, and its choices."""
    shown = f"{knob.help} (default: {default_of_option(knob)})" if knob.unset else knob.help
    return f"{shown}: {', '.join(knob.choices)}" if knob.kind == "choice" else shown


def default_of_option(knob: Knob) -> str:
    """What is taken without an option, in words; empty where that goes without saying or is searched for."""
    default = knob.null if knob.default is None else _worded(knob.default)
    return knob.unset.format(default=default, planned=knob.planned)


def _worded(value: KnobValue) -> str:
    """A value as an answer to a person, who is asked for a switch and not for true or false."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(value)


def _word(knob: Knob, text: str) -> str:
    knob.refuse(text)
    return text


def _names(knob: Knob, text: str) -> str | tuple[str, ...]:
    if text in knob.choices:
        return text
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        words = ", or ".join((*knob.choices, "names with commas between them"))
        raise FieldError(knob.name, text, words)
    return found


def _indices(knob: Knob, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise FieldError(knob.name, text, "token ids with commas between them") from error
