"""The command line that is equal to what the sizing screen shows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from launcher.tui.sizing import Sizing
from planner.training_setup import TrainingSetup


def plan_command(sizing: Sizing) -> str:
    """`plan` with the model, the card and every knob that differs from the contract's default."""
    return shlex.join(["vramwise", "plan", *flags(sizing)])


def train_command(sizing: Sizing, data: str) -> str:
    """`train` for the same setup and a data file."""
    return shlex.join(["vramwise", "train", *flags(sizing), "--data", data])


def flags(sizing: Sizing) -> Sequence[str]:
    """Flags for model, card and knobs; the micro-batch and accumulation are always told, since `plan` chooses them."""
    setup = sizing.setup
    words = ["--model", setup.model]
    if sizing.card.argument is not None:
        words += ["--gpu", sizing.card.argument]
    default = TrainingSetup(model=setup.model, max_length=setup.max_length)
    for name, value in setup.to_dict().items():
        chosen_otherwise = name in (
            "max_length",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
        )
        if name in ("model", "num_processes", "distributed"):
            continue
        if chosen_otherwise or value != default.to_dict()[name]:
            words += ["--" + name.replace("_", "-"), _value(value)]
    return words


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value)
