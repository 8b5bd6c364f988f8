"""Products of float8 (e4m3) matrices with a scale a row.

A row is divided by its largest magnitude over the largest number of e4m3, 448, and rounded to nearest: three
bits of mantissa, an error of 2.6% (root mean square) of each element. Scales come back in the product.
"""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
"""torch.finfo(torch.float8_e4m3fn).max; https://arxiv.org/abs/2209.05433, table 1."""
LEAST_SCALE = 1e-30
"""Of a row of zeros, whose quotient stays zero."""


def row_scales(values: torch.Tensor) -> torch.Tensor:
    """The scale of each row, float32, with a last dimension of one."""
    largest = values.abs().amax(dim=-1, keepdim=True).to(torch.float32)
    return (largest / E4M3_MAX).clamp(min=LEAST_SCALE)


def in_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in e4m3, and the float32 scale of each row."""
    scales = row_scales(values)
    return to_e4m3(values.to(torch.float32) / scales), scales


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """float32 to e4m3; what rounding lifted over the largest number is brought back to it."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def scaled_product(
    left: torch.Tensor,
    left_scales: torch.Tensor,
    right: torch.Tensor,
    right_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """left (M x K) times the transpose of right (N x K), both e4m3 with row scales, as M x N of `dtype`."""
    return torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scales,
        scale_b=right_scales.t(),
        out_dtype=dtype,
        use_fast_accum=FAST_ACCUMULATION,
    )


FAST_ACCUMULATION = True
"""Sums in the tensor cores' own registers: 14 bits or so on Hopper (https://arxiv.org/abs/2412.19437, 3.3.2),
which adds nothing to an error of 3.75% (docs/eight-bit.md) and is a tenth faster."""
