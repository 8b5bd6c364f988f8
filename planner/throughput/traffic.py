"""Bytes that a training step certainly moves: its weights in every pass, and the optimizer's.

What activations cost is counted from the layers' tape (work.py).
"""

from __future__ import annotations

from planner.setup.run import TrainingRun
from planner.throughput.flops import checkpointed_share, linear_work

# bitsandbytes: 0.516 B read, absmax written and read in fp32, 2 B written (backends/cuda/ops.py:904-916).
DEQUANTISE = 2.7
# DoRA's norm: the dequantised weight, BA, their sum and its norm (peft/tuners/lora/dora.py:86-98).
DORA_NORM = 16.0
# fp32 weights under autocast: read 4, write 2.
AUTOCAST_WEIGHT = 6.0
# Per trained parameter and optimizer step: gradient norm and clipping (6), gradient, weight, state read and
# written, for 16-bit weights (state sizes: section "optimizer" of the memory model).
OPTIMIZER = {
    "adamw_torch": 24.0,
    "adamw_torch_fused": 16.0,
    "adamw_8bit": 16.0,
    "paged_adamw_8bit": 16.0,
    "paged_adamw_32bit": 28.0,
    "adafactor": 30.0,
    "lion_8bit": 14.0,
    "paged_lion_8bit": 14.0,
    "sgd": 12.0,
}


# Runs of Python a trained tensor and step: bitsandbytes updates one tensor at a time
# (bitsandbytes/optim/optimizer.py:325-334), so does adafactor with a dozen operations
# (transformers/optimization.py:1057); torch's other optimizers hand lists of tensors to a kernel.
# Shares of adamw_8bit's time are those of updates that were timed (median of RunRecord.update_seconds by
# optimizer, QLoRA on the H100: 0.1 ms a tensor with adamw_8bit).
OPTIMIZER_CALLS = {
    "adamw_torch": 0.45,
    "adamw_torch_fused": 0.3,
    "paged_adamw_8bit": 1.35,
    "paged_adamw_32bit": 1.35,
    "adafactor": 4.0,
    "sgd": 0.16,
}


def weight_bytes(run: TrainingRun) -> float:
    """Bytes of a micro-step's weights: larger than any GPU's cache, so that every step moves them."""
    setup, work = run.setup, linear_work(run.model, run.setup.target_modules)
    forwards = 1 + checkpointed_share(run) + setup.extra_passes
    total = 0.0
    if setup.method == "qlora":
        wide = 2.2 if setup.dtype == "float32" else 1.0
        total += work.linear_weights * DEQUANTISE * wide * (forwards + 1)
        if setup.experts == "4bit":
            # Backward has what the (last) forward pass made of them, but where each product dequantises.
            again = 1 if run.storage.slices_experts else 0
            total += work.expert_weights * DEQUANTISE * wide * (forwards + again)
    elif setup.dtype == "float32":
        total += (work.active_weights + work.active_expert_weights) * AUTOCAST_WEIGHT * forwards
    if setup.use_dora:
        total += work.wrapped_weights * DORA_NORM * forwards
    if not setup.uses_lora and setup.gradient_accumulation_steps > 1:
        total += run.trained.elements * 6.0
    return total
