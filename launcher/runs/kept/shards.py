"""Knobs that do not go together with FSDP2: refused by name before anything is loaded. Light: no torch."""

from __future__ import annotations

from planner.base.errors import FieldError, InputError
from planner.memory.refusals import unsharded_knob
from planner.setup.training_setup import TrainingSetup

_REASONS = {
    "use_dora": "its magnitudes are float32 among 16-bit adapters, which FSDP2 refuses; use distributed=ddp",
    "prepare_for_kbit_training": "it casts to float32 what is sharded in 16 bits; use distributed=ddp",
    "activation_offloading": "it has not been tried together; use distributed=ddp",
    "dtype": "its gradient scaler does not know shards",
}


def refuse_unsharded(setup: TrainingSetup) -> None:
    """Refuse what FSDP2 cannot shard, or would train wrongly: what a plan refuses too.

    Raises:
        InputError: a knob, by name.
    """
    knob = unsharded_knob(setup)
    if knob is None:
        return
    if knob == "optim":
        raise FieldError(
            "optim with distributed=fsdp",
            setup.optim,
            "adamw_torch_fused: bitsandbytes' cannot update shards",
        )
    if knob == "kernels":
        raise InputError("kernels=liger with method full and distributed=fsdp has not been tried together")
    if knob == "lora_r":
        raise InputError(
            f"lora_r={setup.lora_r} with num_processes={setup.num_processes} and distributed=fsdp: shared "
            "out by rows it leaves a GPU without any"
        )
    value = getattr(setup, knob)
    shown = "true" if value is True else value
    raise InputError(f"{knob}={shown} with distributed=fsdp: {_REASONS[knob]}")
