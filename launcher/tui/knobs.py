"""The knobs of the sizing screen: their labels, the values they step through, and text to TrainingSetup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.setup.training_setup import (
    ALL_LINEAR,
    ATTENTION_IMPLEMENTATIONS,
    COMPILE,
    DTYPES,
    KERNELS,
    METHODS,
    OPTIMIZERS,
    SAMPLING_STRATEGIES,
    TrainingSetup,
)

ON, OFF = "on", "off"
AUTO = "auto"
_LORA = (("method", ("qlora", "lora")),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """One knob. `field` is TrainingSetup's name. With `choices` it takes one of them, else it is typed text.

    `steps` are the values that the arrow keys walk through; other values may be typed. `needs` are the texts
    of other knobs without which there is no such knob. `group` is set on the first of each group.
    """

    field: str
    label: str
    help: str
    choices: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    numeric: bool = False
    needs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    group: str = ""

    def applies(self, texts: Mapping[str, str]) -> bool:
        """Whether the other knobs leave this one a meaning."""
        return all(texts[field] in accepted for field, accepted in self.needs)


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
        group="training",
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
        needs=_LORA,
    ),
    Knob(
        field="lora_alpha",
        label="alpha",
        help="lora_alpha: the adapter's scale; empty for twice the rank",
        steps=("", *_POWERS),
        numeric=True,
        needs=_LORA,
    ),
    Knob(
        field="lora_dropout",
        label="dropout",
        help="lora_dropout: share of the adapter's inputs that is zeroed",
        steps=_texts(0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
        numeric=True,
        needs=_LORA,
    ),
    Knob(
        field="target_modules",
        label="targets",
        help="target_modules: all-linear, or module names with spaces between them",
        steps=(ALL_LINEAR, "q_proj v_proj", "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
        needs=_LORA,
    ),
    Knob(field="optim", label="optimizer", help="optim: the optimizer, in TRL's names", choices=OPTIMIZERS),
    Knob(field="dtype", label="dtype", help="dtype: how the base model is loaded", choices=DTYPES),
    Knob(
        field="gradient_checkpointing",
        label="checkpointing",
        help="gradient_checkpointing: recompute activations in the backward pass instead of keeping them",
        choices=(ON, OFF),
        group="layers",
    ),
    Knob(
        field="selective_checkpointing",
        label="keep attention",
        help="selective_checkpointing: keep what attention returns and recompute the rest",
        choices=(OFF, ON),
        needs=(("gradient_checkpointing", (ON,)),),
    ),
    Knob(
        field="activation_offloading",
        label="offloading",
        help="activation_offloading: what layers keep for the backward pass waits in the host's memory",
        choices=(OFF, ON),
    ),
    Knob(
        field="compile",
        label="compile",
        help="compile: regional compiles each decoder layer; that takes a minute, then saves time and memory",
        choices=COMPILE,
    ),
    Knob(
        field="activation_memory_budget",
        label="memory budget",
        help="activation_memory_budget: share of activations that compiled layers keep; empty for all",
        steps=("", *_texts(*(tenth / 10 for tenth in range(10, -1, -1)))),
        numeric=True,
        needs=(("compile", ("regional",)), ("gradient_checkpointing", (OFF,))),
    ),
    Knob(
        field="kernels",
        label="kernels",
        help="kernels: liger fuses norms, rotary embedding and MLP products",
        choices=KERNELS,
    ),
    Knob(
        field="attn_implementation",
        label="attention",
        help="attn_implementation: auto is what transformers picks for the model",
        choices=(AUTO, *ATTENTION_IMPLEMENTATIONS),
    ),
    Knob(
        field="packing",
        label="packing",
        help="packing: several examples fill each sequence",
        choices=(OFF, ON),
        group="batches",
    ),
    Knob(
        field="train_sampling_strategy",
        label="sampling",
        help="train_sampling_strategy: group_by_length puts examples of like length into one batch",
        choices=SAMPLING_STRATEGIES,
        needs=(("packing", (OFF,)),),
    ),
)
_SHARES = ("lora_dropout", "activation_memory_budget")
KNOB_FIELDS = frozenset(knob.field for knob in KNOBS)


def to_texts(setup: TrainingSetup) -> dict[str, str]:
    """What each knob shows for a setup."""
    return {knob.field: _to_text(knob, getattr(setup, knob.field)) for knob in KNOBS}


def to_setup(model: str, texts: Mapping[str, str], others: Mapping[str, Any]) -> TrainingSetup:
    """Build the setup that the knobs describe; `others` are fields without a knob.

    Knobs that do not apply are left out, so that they come back when they do.

    Raises:
        FieldError: a knob's text is not a value it accepts.
        InputError: two values contradict each other.
    """
    values: dict[str, Any] = dict(others)
    for knob in KNOBS:
        if knob.applies(texts):
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


def _to_text(knob: Knob, value: object) -> str:
    if value is None and AUTO in knob.choices:
        return AUTO
    if isinstance(value, bool):
        return ON if value else OFF
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _from_text(knob: Knob, text: str) -> object:
    """The value that a text stands for; a text that is no number is passed on for TrainingSetup to refuse."""
    if set(knob.choices) == {ON, OFF}:
        return text == ON
    if text == AUTO and AUTO in knob.choices:
        return None
    if knob.choices:
        return text
    if not text and "" in knob.steps:
        return None
    if knob.field == "target_modules":
        return text if text == ALL_LINEAR else text.replace(",", " ").split()
    convert = float if knob.field in _SHARES else int
    try:
        return convert(text.replace(",", ""))
    except ValueError:
        return text
