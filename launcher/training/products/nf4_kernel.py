"""The Triton kernel from packed 4-bit levels to e4m3: a program makes a tile, stored as it lies or turned."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from launcher.training.products.scaled import E4M3

TILES: dict[bool, tuple[int, int, int]] = {False: (64, 128, 8), True: (128, 128, 8)}
"""Rows and columns of a tile and warps of a program, by whether it is stored turned: of six on an H200 the
fastest over four shapes (150 and 172 us together)."""


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
    width: tl.constexpr,
):
    # A tile's row is made of runs of `width` elements that share a constant, which is worked out once a run.
    first_column = tl.program_id(1) * tile_columns
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    run = first_column + tl.arange(0, tile_columns // width) * width
    # Offsets in bytes: a weight of 2**32 elements has fewer than 2**31.
    first = row[:, None] * (columns // 2) + run[None, :] // 2
    within = (row < rows)[:, None] & (run < columns)[None, :]
    where = first // (block // 2)
    if is_nested:
        constant = tl.load(absmax + where, mask=within, other=0).to(tl.int32)
        scale = tl.load(nested_code + constant) * tl.load(nested + where // 256, mask=within, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + where, mask=within, other=0.0)
    scale = scale / tl.load(row_scales + row, mask=row < rows, other=1.0)[:, None]
    at = first[:, :, None] + tl.arange(0, width // 2)[None, None, :]
    both = tl.load(packed + at, mask=within[:, :, None], other=0).to(tl.int32)
    high = tl.load(code + (both >> 4)) * scale[:, :, None]
    low = tl.load(code + (both & 15)) * scale[:, :, None]
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


@torch.library.triton_op("vramwise::nf4_to_e4m3_kernel", mutates_args=())  # type: ignore[untyped-decorator]
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
    """Run the kernel on the current stream. Known to torch as a Triton kernel, so that compiled layers launch
    it like their own: through a custom operator a call takes the host 84 us, of which the launch is 15.
    """
    rows = row_scales.shape[0]
    out = torch.empty((columns, rows) if transposed else (rows, columns), dtype=E4M3, device=packed.device)
    tile_rows, tile_columns, warps = TILES[transposed]
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))
    torch.library.wrap_triton(_kernel)[grid](
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
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        width=math.gcd(block, columns, tile_columns),
        num_warps=warps,
    )
    return out
