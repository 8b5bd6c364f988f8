"""A 4-bit weight as e4m3, without a 16-bit copy between: one kernel from packed levels to scaled bytes.

A weight of N x K has one scale a row (N). Its e4m3 elements are the same in both passes: the forward product
reads them row by row, the backward product reads their transpose, and a row's scale goes into the gradient
instead, so that both products see one weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from launcher.training.products.scaled import E4M3, to_e4m3

if torch.cuda.is_available():
    import launcher.training.products.nf4_kernel  # noqa: F401  # makes the operator for weights on a GPU

NESTED_BLOCK = 256
"""Constants that share a constant of theirs (bitsandbytes functional.py, quantize_4bit)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """How a packed weight is read: the levels, a constant a block, and where those are quantised theirs.

    `code` has 16 float32 levels. `absmax` is float32, or uint8 with `nested_code` (256 float32), `nested`
    (float32, one for each 256 constants) and `offset` (float32, one element).
    """

    absmax: torch.Tensor
    code: torch.Tensor
    nested: torch.Tensor | None
    nested_code: torch.Tensor | None
    offset: torch.Tensor | None
    block: int

    @classmethod
    def of(cls, state: Any) -> Constants:
        """Of bitsandbytes' QuantState."""
        inner = state.state2 if state.nested else None
        return cls(
            absmax=state.absmax,
            code=state.code,
            nested=None if inner is None else inner.absmax,
            nested_code=None if inner is None else inner.code,
            offset=state.offset if inner is not None else None,
            block=state.blocksize,
        )


def weight_in_e4m3(
    packed: torch.Tensor, constants: Constants, row_scales: torch.Tensor, columns: int, *, transposed: bool
) -> torch.Tensor:
    """A packed weight as e4m3: N x K, or K x N when `transposed`, contiguous either way."""
    known = torch.ops.vramwise
    operator = known.nf4_to_e4m3_kernel if packed.is_cuda else known.nf4_to_e4m3
    made: torch.Tensor = operator(
        packed,
        constants.absmax,
        constants.code,
        constants.nested,
        constants.nested_code,
        constants.offset,
        row_scales,
        constants.block,
        columns,
        transposed,
    )
    return made


def dequantised(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    block: int,
    columns: int,
) -> torch.Tensor:
    """A packed weight as float32, N x K, in plain operations of torch."""
    shifts = torch.tensor([4, 0], dtype=torch.uint8, device=packed.device)
    levels = code[((packed.view(torch.uint8).reshape(-1, 1) >> shifts) & 15).int()]
    scales = absmax
    if nested is not None:
        assert nested_code is not None
        assert offset is not None
        wide = nested.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        scales = nested_code[absmax.int()] * wide + offset
    return (levels.reshape(-1, block) * scales.reshape(-1, 1)).reshape(-1, columns)


# For weights on a CPU; nf4_kernel.py has the GPU's.
@torch.library.custom_op("vramwise::nf4_to_e4m3", mutates_args=())  # type: ignore[untyped-decorator]
def _nf4_to_e4m3(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    row_scales: torch.Tensor,
    block: int,
    columns: int,
    transposed: bool,
) -> torch.Tensor:
    values = dequantised(packed, absmax, code, nested, nested_code, offset, block, columns)
    eight = to_e4m3(values / row_scales)
    return eight.t().contiguous() if transposed else eight


@_nf4_to_e4m3.register_fake  # type: ignore[untyped-decorator]
def _(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    row_scales: torch.Tensor,
    block: int,
    columns: int,
    transposed: bool,
) -> torch.Tensor:
    rows = row_scales.shape[0]
    return packed.new_empty((columns, rows) if transposed else (rows, columns), dtype=E4M3)
