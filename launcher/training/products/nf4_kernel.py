"""The Triton kernel from packed 4-bit levels to e4m3: a program makes a tile, stored as it lies or turned."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from launcher.training.products.scaled import E4M3

TILE_ROWS = 128
TILE_COLUMNS, TILE_COLUMNS_TURNED = 64, 128
"""The fastest of six tiles on an H200: 23 us for 4096 x 4096 as it lies, 26 turned (docs/eight-bit.md)."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    packed,
    absmax,
    code,
    nested,
    nested_code,
    offset,
    row_scales,
    out,
    rows,
    columns,
    block: tl.constexpr,
    is_nested: tl.constexpr,
    turned: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    first_row = tl.program_id(0) * tile_rows
    first_column = tl.program_id(1) * tile_columns
    row = first_row + tl.arange(0, tile_rows)
    pair = first_column // 2 + tl.arange(0, tile_columns // 2)
    inside = (row < rows)[:, None] & (pair < columns // 2)[None, :]
    # Offsets in bytes: a weight of 2**32 elements has fewer than 2**31.
    at = row[:, None] * (columns // 2) + pair[None, :]
    both = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    # A block of constants is a multiple of two elements, so that a byte's two levels share one.
    where = at // (block // 2)
    if is_nested:
        constant = tl.load(absmax + where, mask=inside, other=0).to(tl.int32)
        scale = tl.load(nested_code + constant) * tl.load(nested + where // 256, mask=inside, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + where, mask=inside, other=0.0)
    divisor = tl.load(row_scales + row, mask=row < rows, other=1.0)
    scale = scale / divisor[:, None]
    high = tl.load(code + (both >> 4)) * scale
    low = tl.load(code + (both & 15)) * scale
    values = tl.reshape(tl.join(high, low), (tile_rows, tile_columns))
    values = tl.minimum(tl.maximum(values, -448.0), 448.0)
    eight = values.to(tl.float8e4nv)
    column = first_column + tl.arange(0, tile_columns)
    if turned:
        place = column[:, None] * rows + row[None, :]
        kept = (column < columns)[:, None] & (row < rows)[None, :]
        tl.store(out + place, tl.trans(eight), mask=kept)
    else:
        place = row[:, None] * columns + column[None, :]
        kept = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(out + place, eight, mask=kept)


def launch(
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
    """Run the kernel on the current stream."""
    rows = row_scales.shape[0]
    out = torch.empty((columns, rows) if transposed else (rows, columns), dtype=E4M3, device=packed.device)
    tile_columns = TILE_COLUMNS_TURNED if transposed else TILE_COLUMNS
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, tile_columns))
    _kernel[grid](
        packed.view(torch.uint8),
        absmax,
        code,
        code if nested is None else nested,
        code if nested_code is None else nested_code,
        code if offset is None else offset,
        row_scales,
        out,
        rows,
        columns,
        block=block,
        is_nested=nested is not None,
        turned=transposed,
        tile_rows=TILE_ROWS,
        tile_columns=tile_columns,
        num_warps=8,
    )
    return out
