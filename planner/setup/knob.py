"""Knob: what is known of one key of TrainingSetup. planner/setup/knobs.py has a row for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.values import dataclass

Kind = Literal["choice", "int", "float", "bool", "names", "indices"]
KnobValue = str | int | float | bool | tuple[str, ...] | tuple[int, ...]
Check = Callable[[object], object]
"""Raises FieldError where a knob does not accept the value."""

METHODS = ("qlora", "lora", "full")
SECTIONS = ("training", "layers", "batches", "GPUs")
"""Groups of knobs, in the order in which the form and docs/knobs.md have them."""
_MAX_NAMES = 1000
_MAX_INDEX = 2**31
_LISTED = {"names": "module names", "indices": "token ids"}
"""What lists are of, by the kind of knob."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a value that is not free needs: `other` with any value but `other_than`.

    `told` says so in the message, which begins with `subject`, or with the knob's name where that is empty;
    `{value}` in it stands for the knob's value.
    """

    other: str
    other_than: KnobValue | None
    told: str
    subject: str = ""

    def message(self, name: str) -> str:
        """The contradiction in a line, `{value}` in it the knob's value."""
        return f"{self.subject or name} needs {self.told}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """How planner/memory/measured/coverage.py counts a knob among what measured runs had.

    Each value counts by itself; with `others`, all values but the default count as that word. The default
    counts as well unless `default` is false. With `as_run` it is what runs that counts, which depends on the
    model and other knobs. Knobs that count `together` ask for other blocks, so that any two of them that are
    not `usual` (the default's text, where this is empty) have to be measured together.
    """

    others: str = ""
    default: bool = True
    as_run: bool = False
    usual: str = ""
    together: bool = False


WHERE_SET = Counted(others="true", default=False, together=True)
"""How a switch counts that changes what layers ask for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A knob on the form of the sizing screen: `place` orders those of a section.

    `steps` are the values that the arrow keys walk through where there are no choices; others may be typed.
    """

    place: int
    label: str
    help: str
    steps: tuple[KnobValue, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of its own in the plan's text, for a value that is not the default; `place` orders the lines."""

    place: int
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """One key of TrainingSetup, named as TRL, PEFT and bitsandbytes name it.

    `help` says in a few words what it is. `choices` are what a choice accepts, and the words that names
    accept in place of a list; `refused` are words that people know and that cannot work, each with why and
    with which release; `bounds` the smallest and the largest number. Null is accepted where `null`
    says what it stands for. A knob without default is `required`.

    `methods` are those that use it. For the others a value that is not the default is refused, or `kept` for
    when the method changes back. What a value `needs` of other knobs it needs unless it is the default or one
    of `free`.

    `planned` is what a plan takes in the default's place where nothing is asked and nothing is chosen.
    `unset` is what the option's help calls the default, with `{default}` and `{planned}` in it.

    Raises:
        FieldError: the row contradicts itself.
    """

    name: str
    kind: Kind
    section: str
    help: str
    default: KnobValue | None = None
    required: bool = False
    null: str = ""
    choices: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    bounds: tuple[float, float] | None = None
    methods: tuple[str, ...] = METHODS
    kept: bool = False
    needs: tuple[Need, ...] = ()
    free: tuple[KnobValue | None, ...] = ()
    planned: KnobValue | None = None
    unset: str = ""
    counted: Counted | None = None
    form: Form | None = None
    line: Line | None = None

    def __post_init__(self) -> None:
        validate.choice(f"{self.name}.section", self.section, SECTIONS)
        if (self.kind in ("int", "float")) != (self.bounds is not None):
            raise FieldError(f"{self.name}.bounds", self.bounds, "two numbers for int and float, else none")
        listed = self.kind == "names" and bool(self.null)
        if not listed and (self.kind in ("choice", "names")) != bool(self.choices):
            raise FieldError(f"{self.name}.choices", self.choices, "words for choice and names, else none")
        if not self.required:
            self.check()(self.default)
        if self.planned is not None:
            self.check()(self.planned)

    def check(self) -> Check:
        """What checks a value of the knob, made once and called for every setup."""
        check = _check(self)
        if not self.null:
            return check

        def check_or_null(value: object) -> None:
            if value is not None:
                check(value)

        return check_or_null

    @property
    def label(self) -> str:
        """What a person calls it: as the form has it, or the plan's text, or its name in words."""
        if self.form is not None:
            return self.form.label
        return self.name.replace("_", " ") if self.line is None else self.line.label

    def refuse(self, value: object) -> None:
        """Refuse a word that cannot work, by why.

        Raises:
            InputError: it is one.
        """
        for word, why in self.refused:
            if value == word:
                raise InputError(f"{self.name} {word}: {why}")

    def in_words(self, value: object) -> str:
        """The knob at a value, in a few words."""
        if value is None:
            return f"{self.label}: {self.null}"
        if isinstance(value, bool):
            return f"{self.label} {'on' if value else 'off'}"
        return f"{self.label} {value:,}" if isinstance(value, int) else f"{self.label} {plain(value)}"

    @property
    def accepted(self) -> str:
        """The accepted values in words, null aside."""
        if self.kind == "bool":
            return "true, false"
        if self.bounds is not None:
            low, high = self.bounds
            return f"{low:,} to {high:,}" if self.kind == "int" else f"{low:g} to {high:g}"
        if self.kind in _LISTED:
            return " or ".join((*self.choices, f"a list of {_LISTED[self.kind]}"))
        return ", ".join(self.choices)


def plain(value: object) -> str:
    """A knob's value as JSON words it, lists with commas between their names."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "null" if value is None else str(value)


def _check(knob: Knob) -> Check:
    name = knob.name
    if knob.bounds is not None:
        low, high = knob.bounds
        if knob.kind == "int":
            return partial(validate.integer, name, minimum=int(low), maximum=int(high))
        return partial(validate.number, name, minimum=low, maximum=high)
    if knob.kind == "bool":
        return partial(validate.boolean, name)
    if knob.kind == "choice":
        accept = partial(validate.choice, name, accepted=knob.choices)
        return partial(_choice, knob, accept) if knob.refused else accept
    if knob.kind == "indices":
        return partial(_indices, name)
    return partial(_names, name, knob.choices)


def _choice(knob: Knob, accept: Check, value: object) -> None:
    knob.refuse(value)
    accept(value)


def _names(name: str, words: tuple[str, ...], value: object) -> None:
    if value in words:
        return
    if not isinstance(value, (list, tuple)) or not value or len(value) > _MAX_NAMES:
        raise _no_names(name, value, words)
    for item in value:
        if not isinstance(item, str) or not item or not item.isprintable():
            raise _no_names(name, value, words)
    if len(set(value)) != len(value):
        raise FieldError(name, value, "each module name once")


def _no_names(name: str, value: object, words: tuple[str, ...]) -> FieldError:
    accepted = " or ".join((*(f'"{word}"' for word in words), "a non-empty list of module names"))
    return FieldError(name, value, accepted)


def _indices(name: str, value: object) -> None:
    ids = value if isinstance(value, (list, tuple)) else ()
    whole = all(type(item) is int and 0 <= item < _MAX_INDEX for item in ids)
    if not whole or not 0 < len(ids) <= _MAX_NAMES or len(set(ids)) != len(ids):
        raise FieldError(name, value, f"a list of at most {_MAX_NAMES:,} token ids, each once")
