"""Knobs that do not go together with FSDP2: refused by name before anything is loaded. Light: no torch."""

from __future__ import annotations

from planner.base.errors import FieldError, InputError
from planner.setup.training_setup import TrainingSetup

SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""torch's own take sharded parameters; bitsandbytes' fail in their first step on a mixture of Tensor and
DTensor (bitsandbytes 0.50.2, seen on two H200)."""


def refuse_unsharded(setup: TrainingSetup) -> None:
    """Refuse what FSDP2 cannot shard, or would train wrongly.

    Raises:
        InputError: a knob, by name.
    """
    if setup.optim not in SHARDED_OPTIMIZERS:
        raise FieldError(
            "optim with distributed=fsdp",
            setup.optim,
            "adamw_torch_fused: bitsandbytes' cannot update shards",
        )
    for name, reason in (
        ("use_dora", "its magnitudes are float32 among 16-bit adapters, which FSDP2 refuses"),
        ("prepare_for_kbit_training", "it casts to float32 what is sharded in 16 bits"),
        ("activation_offloading", "it has not been tried together"),
    ):
        if getattr(setup, name):
            raise InputError(f"{name}=true with distributed=fsdp: {reason}; use distributed=ddp")
    if setup.dtype == "float16":
        raise InputError("dtype=float16 with distributed=fsdp: its gradient scaler does not know shards")
    if setup.compile != "none":
        raise InputError(
            f"compile={setup.compile} with distributed=fsdp: FSDP2's hooks keep layers from being compiled "
            "(measured: not a byte differs from uncompiled); use compile=none or distributed=ddp"
        )
    if setup.kernels == "liger" and setup.method == "full":
        raise InputError("kernels=liger with method full and distributed=fsdp has not been tried together")
    if not setup.every_process_has_rows:
        raise InputError(
            f"lora_r={setup.lora_r} with num_processes={setup.num_processes} and distributed=fsdp: shared "
            "out by rows it leaves a GPU without any"
        )
