"""The knobs of the sizing screen: their labels, the values they step through, and text to TrainingSetup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.training_setup import ALL_LINEAR, DTYPES, METHODS, OPTIMIZERS, TrainingSetup

ON, OFF = "on", "off"


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """One knob. `field` is TrainingSetup's name. With `choices` it takes one of them, else it is typed text.

    `steps` are the values that the arrow keys walk through; other values may be typed. `lora_only` says that
    full fine-tuning has no such knob.
    """

    field: str
    label: str
    help: str
    choices: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    numeric: bool = False
    lora_only: bool = False


def _texts(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:g}" for value in values)


_LENGTHS = tuple(
    str(n) for n in sorted({2**k for k in range(7, 21)} | {3 * 2**k for k in range(7, 19)}) if n >= 128
)
_POWERS = tuple(str(2**k) for k in range(11))

KNOBS: tuple[Knob, ...] = (
    Knob(
        field="method",
        label="method",
        help="qlora: adapter on a 4-bit base; lora: on a 16-bit base; full: all weights",
        choices=METHODS,
    ),
    Knob(
        field="max_length",
        label="max length",
        help="max_length: tokens per sequence",
        steps=_LENGTHS,
        numeric=True,
    ),
    Knob(
        field="per_device_train_batch_size",
        label="micro-batch",
        help="per_device_train_batch_size: sequences in one forward pass",
        steps=_texts(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),
        numeric=True,
    ),
    Knob(
        field="gradient_accumulation_steps",
        label="accumulation",
        help="gradient_accumulation_steps: micro-batches in one optimizer step",
        steps=_POWERS,
        numeric=True,
    ),
    Knob(
        field="lora_r",
        label="rank",
        help="lora_r: the adapter's rank",
        steps=_POWERS,
        numeric=True,
        lora_only=True,
    ),
    Knob(
        field="lora_alpha",
        label="alpha",
        help="lora_alpha: the adapter's scale; empty for twice the rank",
        steps=("", *_POWERS),
        numeric=True,
        lora_only=True,
    ),
    Knob(
        field="lora_dropout",
        label="dropout",
        help="lora_dropout: share of the adapter's inputs that is zeroed",
        steps=_texts(0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
        numeric=True,
        lora_only=True,
    ),
    Knob(
        field="target_modules",
        label="targets",
        help="target_modules: all-linear, or module names with spaces between them",
        steps=(ALL_LINEAR, "q_proj v_proj", "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
        lora_only=True,
    ),
    Knob(field="optim", label="optimizer", help="optim: the optimizer, in TRL's names", choices=OPTIMIZERS),
    Knob(
        field="gradient_checkpointing",
        label="checkpointing",
        help="gradient_checkpointing: recompute activations in the backward pass instead of keeping them",
        choices=(ON, OFF),
    ),
    Knob(field="dtype", label="dtype", help="dtype: how the base model is loaded", choices=DTYPES),
)
KNOB_FIELDS = frozenset(knob.field for knob in KNOBS)


def to_texts(setup: TrainingSetup) -> dict[str, str]:
    """What each knob shows for a setup."""
    return {knob.field: _to_text(getattr(setup, knob.field)) for knob in KNOBS}


def to_setup(model: str, texts: Mapping[str, str], others: Mapping[str, Any]) -> TrainingSetup:
    """Build the setup that the knobs describe; `others` are fields without a knob.

    Knobs that full fine-tuning does not have are left out for it, so that they come back with LoRA.

    Raises:
        FieldError: a knob's text is not a value it accepts.
        InputError: two values contradict each other.
    """
    full = texts["method"] == "full"
    values: dict[str, Any] = dict(others)
    for knob in KNOBS:
        if not (full and knob.lora_only):
            values[knob.field] = _from_text(knob, texts[knob.field].strip())
    return TrainingSetup(model=model, **values)


def other_fields(setup: TrainingSetup) -> dict[str, Any]:
    """Fields of a setup that no knob shows and that differ from their defaults."""
    default = TrainingSetup(model=setup.model, max_length=setup.max_length)
    return {
        name: value
        for name, value in setup.to_dict().items()
        if name not in KNOB_FIELDS and name != "model" and value != getattr(default, name)
    }


def step(knob: Knob, current: str, direction: int) -> str | None:
    """The next value of a knob in a direction; None at the end of its values."""
    values = knob.choices or knob.steps
    if current in values:
        index = values.index(current) + direction
        return values[index] if 0 <= index < len(values) else None
    if not knob.numeric:
        return values[0] if values else None
    try:
        here = float(current)
    except ValueError:
        return values[0]
    beyond = [v for v in values if v and (float(v) > here if direction > 0 else float(v) < here)]
    return (beyond[0] if direction > 0 else beyond[-1]) if beyond else None


def _to_text(value: object) -> str:
    if isinstance(value, bool):
        return ON if value else OFF
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _from_text(knob: Knob, text: str) -> object:
    """The value that a text stands for; a text that is no number is passed on for TrainingSetup to refuse."""
    if knob.field == "gradient_checkpointing":
        return text == ON
    if knob.choices:
        return text
    if knob.field == "lora_alpha" and not text:
        return None
    if knob.field == "target_modules":
        return text if text == ALL_LINEAR else text.replace(",", " ").split()
    convert = float if knob.field == "lora_dropout" else int
    try:
        return convert(text.replace(",", ""))
    except ValueError:
        return text
