"""Products with the frozen base in 8 bits: what of a run's work they are, and what they take.

Measured on an H200 beside the same setups in 16 bits (docs/eight-bit.md): Llama-3.1-8B at 8 x 2,048, not
checkpointed, and at 2 x 2,048, checkpointed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from planner.models.spec import ModelSpec
from planner.models.storage import EIGHT_BIT_MULTIPLE, EXACT_ENDS
from planner.setup.run import RunKind
from planner.throughput.flops import checkpointed_share

OPERATION_SHARE = 0.53
"""Time of an 8-bit operation beside one in 16 bits: 95 of 176 us for 4096 x 4096 x 4096 and 352 of 705 with
16,384 rows, row-wise scales. Published rates of Ada, Hopper and Blackwell are twice those of 16 bits too."""
KERNEL_BYTES = 1.2
"""What a weight's element takes beyond the byte written, in bytes of dequantisation: 25 us for 4096 x 4096
where bitsandbytes' kernels take 29 for 2.7 bytes. A 16-bit weight is read, 2 bytes."""
CALL_SHARE = 0.25
"""The host's time for the kernel that makes a weight e4m3, beside that of a compiled layer's call of
bitsandbytes: the two setups at 2 x 2,048, which the host decides in part, need 0.2 to 0.3."""


LEAST_SHARE = 0.5
"""The least that an operation can take beside one in 16 bits: published rates of 8 bits are twice as high."""
WIDER = (0.9, 1.08)
"""Factors on the ends of a forecast's interval: five of six runs with 8-bit products on an H200 lie within 5%
of their forecast beside the forecast of the same setup in 16 bits, one 6% below; of no other card is
anything known."""


class EightBit(NamedTuple):
    """8-bit products of a pass: how many, and their weights' elements."""

    products: float
    elements: float


def eight_bit_products(run: RunKind) -> tuple[EightBit, EightBit]:
    """Those of a forward pass, and of a backward pass with what it recomputes.

    The gradient's products are in 8 bits with either setting; the forward pass of all layers but those at the
    ends, and what of it is recomputed, with fp8.
    """
    if run.setup.base_matmul == "bf16":
        return _NONE, _NONE
    every = _eligible(run.model)
    layers = run.model.num_hidden_layers
    inner = max(0, layers - 2 * EXACT_ENDS) / layers if run.setup.base_matmul == "fp8" else 0.0
    again = 1.0 + inner * checkpointed_share(run)
    return _times(every, inner), _times(every, again)


def sooner_flops(part: EightBit, tokens: int) -> float:
    """16-bit operations that take as long as what 8-bit products of so many tokens save."""
    return 2.0 * part.elements * tokens * (1.0 - OPERATION_SHARE)


def least_flops(run: RunKind, total_flops: float, tokens: int) -> float:
    """16-bit operations that take as long as a micro-step's would at peak rates."""
    elements = sum(part.elements for part in eight_bit_products(run))
    return total_flops - 2.0 * elements * tokens * (1.0 - LEAST_SHARE)


def _times(part: EightBit, times: float) -> EightBit:
    return EightBit(part.products * times, part.elements * times)


_NONE = EightBit(0.0, 0.0)


@lru_cache(maxsize=256)
def _eligible(model: ModelSpec) -> EightBit:
    """The decoder layers' linear layers whose sizes have 8-bit products."""
    found = [
        part
        for part in model.parameters
        if part.in_decoder_layer
        and part.module_class == "Linear"
        and part.kind == "weight"
        and not any(size % EIGHT_BIT_MULTIPLE for size in part.shape)
    ]
    return EightBit(sum(part.count for part in found), sum(part.elements * part.count for part in found))
