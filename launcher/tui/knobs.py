"""The knobs of the sizing screen: their labels, the values they step through, and text to TrainingSetup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.tui.cards import Card
from launcher.tui.dataset import Dataset
from launcher.tui.sizing import Wishes
from planner.base import validate
from planner.gpus.price import MAX_PRICE
from planner.gpus.spec import GpuSpec
from planner.setup import defaults
from planner.setup.knob import METHODS, SECTIONS, Kind, Knob, KnobValue
from planner.setup.knobs import KNOBS
from planner.setup.training_setup import TrainingSetup

ON, OFF = "on", "off"
AUTO = "auto"
MAX_EPOCHS = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One knob on the form. `field` is TrainingSetup's name, `words` names that stand for a list.

    With `choices` it takes one of them, else it is typed text. `steps` are the values that the arrow keys
    walk through; other values may be typed. Where another knob has its text in `unless` there is no such
    knob. `group` is set on the first of each group.
    """

    field: str
    kind: Kind
    label: str
    help: str
    choices: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    unless: tuple[tuple[str, str], ...] = ()
    group: str = ""

    @property
    def numeric(self) -> bool:
        """Whether it is a number that is typed."""
        return self.kind in ("int", "float")

    def applies(self, texts: Mapping[str, str]) -> bool:
        """Whether the other knobs leave this one a meaning."""
        return not any(texts[field] == text for field, text in self.unless)


DISPLAY, PRICE, EPOCHS = "display", "price", "epochs"
ASKED = (
    Row(
        field=DISPLAY,
        kind="bool",
        label="display",
        help="a display is attached to the card and takes memory of it",
        choices=(OFF, ON),
    ),
    Row(
        field=PRICE,
        kind="float",
        label="$ a GPU-hour",
        help="price of a GPU for an hour; empty for the catalog's",
        steps=("", "0.1", "0.2", "0.5", "1", "2", "3", "5", "10"),
    ),
    Row(
        field=EPOCHS,
        kind="float",
        label="epochs",
        help="passes over the data",
        steps=("0.5", "1", "2", "3", "5", "10"),
    ),
)
"""What is asked beside model, card, data and knobs."""


def asked_texts(card: Card, price: float | None = None) -> dict[str, str]:
    """What those rows begin with."""
    return {
        DISPLAY: ON if card.display else OFF,
        PRICE: "" if price is None else f"{price:g}",
        EPOCHS: f"{defaults.EPOCHS:g}",
    }


def to_wishes(texts: Mapping[str, str], data: Dataset | None) -> Wishes:
    """What the rows ask for.

    Raises:
        FieldError: a text is not a value that its row accepts.
    """
    price, epochs = texts[PRICE].strip(), texts[EPOCHS].strip()
    passes = _number_in(EPOCHS, epochs or f"{defaults.EPOCHS:g}", minimum=1e-6, maximum=MAX_EPOCHS)
    return Wishes(
        data=data,
        num_train_epochs=None if passes == defaults.EPOCHS else passes,
        usd_per_gpu_hour=_number_in(PRICE, price, minimum=0.0, maximum=MAX_PRICE) if price else None,
    )


def _number_in(field: str, text: str, *, minimum: float, maximum: float) -> float:
    try:
        value: object = float(text.replace(",", ""))
    except ValueError:
        value = text
    return validate.number(field, value, minimum=minimum, maximum=maximum)


def on_card(texts: Mapping[str, str], old: GpuSpec, new: GpuSpec) -> dict[str, str]:
    """The texts on another card: in its own 16-bit type where they were in the old one's."""
    return {**texts, "dtype": new.dtype} if texts["dtype"] == old.dtype else dict(texts)


def rows(knobs: tuple[Knob, ...] = KNOBS) -> tuple[Row, ...]:
    """The form's rows: those knobs that have a place on it, section by section."""
    placed = [(knob, knob.form) for knob in knobs if knob.form is not None]
    placed.sort(key=lambda pair: (SECTIONS.index(pair[0].section), pair[1].place))
    shown = {knob.name: knob for knob, _ in placed}
    first = {knob.section: knob for knob, _ in reversed(placed)}
    return tuple(
        Row(
            field=knob.name,
            kind=knob.kind,
            label=form.label,
            help=form.help,
            choices=_choices(knob),
            steps=_steps(knob, form.steps),
            words=knob.choices if knob.kind == "names" else (),
            unless=_unless(knob, shown),
            group=knob.section if first[knob.section] is knob else "",
        )
        for knob, form in placed
    )


def _choices(knob: Knob) -> tuple[str, ...]:
    if knob.kind == "bool":
        return (ON, OFF) if knob.default else (OFF, ON)
    if knob.kind == "choice":
        return (AUTO, *knob.choices) if knob.null else knob.choices
    return ()


def _steps(knob: Knob, steps: tuple[KnobValue, ...]) -> tuple[str, ...]:
    """Usual values as texts, the empty one for null first."""
    texts = tuple(_to_text(value) for value in steps)
    return ("", *texts) if knob.null and knob.kind != "choice" else texts


def _unless(knob: Knob, shown: Mapping[str, Knob]) -> tuple[tuple[str, str], ...]:
    """The other knobs' texts that leave a knob no meaning."""
    methods = [("method", method) for method in METHODS if method not in knob.methods]
    needs = [
        (need.other, _to_text(need.other_than, auto=AUTO in _choices(shown[need.other])))
        for need in knob.needs
        if need.other in shown
    ]
    return (*methods, *needs)


def to_texts(setup: TrainingSetup) -> dict[str, str]:
    """What each knob shows for a setup."""
    return {row.field: _to_text(getattr(setup, row.field), auto=AUTO in row.choices) for row in ROWS}


def to_setup(model: str, texts: Mapping[str, str], others: Mapping[str, Any]) -> TrainingSetup:
    """Build the setup that the knobs describe; `others` are fields without a knob.

    Knobs that do not apply are left out, so that they come back when they do.

    Raises:
        FieldError: a knob's text is not a value it accepts.
        InputError: two values contradict each other.
    """
    values: dict[str, Any] = dict(others)
    for row in ROWS:
        if row.applies(texts):
            values[row.field] = _from_text(row, texts[row.field].strip())
    return TrainingSetup(model=model, **values)


def other_fields(setup: TrainingSetup) -> dict[str, Any]:
    """Fields of a setup that no knob shows and that differ from their defaults. How experts are held is none:
    it follows from the model (launcher/tui/sizing.py).
    """
    default = TrainingSetup(model=setup.model, max_length=setup.max_length)
    return {
        name: value
        for name, value in setup.to_dict().items()
        if name not in FORM_FIELDS and name not in ("model", "experts") and value != getattr(default, name)
    }


def step(row: Row, current: str, direction: int) -> str | None:
    """The next value of a knob in a direction; None at the end of its values."""
    values = row.choices or row.steps
    if current in values:
        index = values.index(current) + direction
        return values[index] if 0 <= index < len(values) else None
    if not row.numeric:
        return values[0] if values else None
    try:
        here = float(current)
    except ValueError:
        return values[0]
    beyond = [v for v in values if v and (float(v) > here if direction > 0 else float(v) < here)]
    return (beyond[0] if direction > 0 else beyond[-1]) if beyond else None


def _to_text(value: object, *, auto: bool = False) -> str:
    if isinstance(value, bool):
        return ON if value else OFF
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, float):
        return f"{value:g}"
    if value is None:
        return AUTO if auto else ""
    return str(value)


def _from_text(row: Row, text: str) -> object:
    """The value that a text stands for; a text that is no number is passed on for TrainingSetup to refuse."""
    if row.kind == "bool":
        return text == ON
    if row.kind == "choice":
        return None if text == AUTO and AUTO in row.choices else text
    if not text and "" in row.steps:
        return None
    if row.kind == "names":
        return text if text in row.words else text.replace(",", " ").split()
    convert = float if row.kind == "float" else int
    try:
        return convert(text.replace(",", ""))
    except ValueError:
        return text


ROWS = rows()
FORM_FIELDS = frozenset(row.field for row in ROWS)
