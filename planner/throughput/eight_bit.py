"""Products with the frozen base in 8 bits: how much of a run's matrix work they are, and how long that takes."""

from __future__ import annotations

from functools import lru_cache

from planner.models.spec import ModelSpec
from planner.models.storage import EIGHT_BIT_MULTIPLE, EXACT_ENDS
from planner.setup.run import TrainingRun
from planner.throughput.flops import checkpointed_share

OPERATION_SHARE = 0.53
"""Time of an 8-bit operation beside one in 16 bits."""


def saved_flops(run: TrainingRun) -> tuple[float, float]:
    """Operations that a micro-step's forward and backward pass are done sooner by, in those of 16 bits.

    The gradient's products are in 8 bits with either; the forward pass and what of it is recomputed with fp8.
    """
    if run.setup.base_matmul == "bf16":
        return 0.0, 0.0
    sooner = 2.0 * _eligible_weights(run.model) * run.micro_step.tokens * (1.0 - OPERATION_SHARE)
    if run.setup.base_matmul == "fp8_backward":
        return 0.0, sooner
    layers = run.model.num_hidden_layers
    inner = sooner * max(0, layers - 2 * EXACT_ENDS) / layers
    return inner, sooner + inner * checkpointed_share(run)


@lru_cache(maxsize=256)
def _eligible_weights(model: ModelSpec) -> int:
    """Elements of the decoder layers' linear layers whose sizes have 8-bit products."""
    return sum(
        part.elements * part.count
        for part in model.parameters
        if part.in_decoder_layer
        and part.module_class == "Linear"
        and part.kind == "weight"
        and not any(size % EIGHT_BIT_MULTIPLE for size in part.shape)
    )
