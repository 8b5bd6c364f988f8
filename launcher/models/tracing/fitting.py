"""Runs of one block at several batches and lengths, joined: what each buffer's bytes grow with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from launcher.models.tracing.block import BlockRun
from launcher.models.tracing.fused import Work
from planner.base.errors import InputError
from planner.models.traced import BufferBytes, LoopWork, TracedLoops, TracedOperation, TracedPass


class Point(NamedTuple):
    """A batch of rows of one length."""

    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.batch * self.length

    @property
    def scores(self) -> int:
        """Score elements of one head of attention."""
        return self.batch * self.length**2


POINTS = (Point(2, 512), Point(4, 512), Point(2, 1536), Point(3, 1024))
"""The first two tell what a row costs from what is there once, the three lengths what of a row grows with its
length and what with the square of that. Lengths are whole chunks of the layers that work by chunks (of 64 to
256 tokens). No batch is of one row, whose transposed tensors lie in order, so that less is copied.
"""


def joined(runs: Sequence[BlockRun]) -> TracedPass:
    """One pass of the runs at POINTS.

    Raises:
        InputError: the block does other operations at another length, or a buffer's bytes grow with
            something else than tokens and their squares.
    """
    first = runs[0]
    for other in runs[1:]:
        if (other.steps, other.operations) != (first.steps, first.operations):
            raise InputError("it does other operations where sequences are longer")
    table: dict[BufferBytes, int] = {}

    def size_of(found: Sequence[int]) -> int:
        return table.setdefault(_bytes(found), len(table))

    buffers = tuple(size_of(found) for found in zip(*(run.buffer_bytes for run in runs), strict=True))
    operations = tuple(
        _with_buffers(
            operation,
            [size_of(found) for found in zip(*(run.backward_bytes[i] for run in runs), strict=True)],
        )
        for i, operation in enumerate(first.operations)
    )
    return TracedPass(
        sizes=tuple(table),
        buffers=buffers,
        widths=first.widths,
        steps=first.steps,
        operations=operations,
        output=first.output,
        result=first.result,
    )


def loops_of(runs: Sequence[BlockRun]) -> TracedLoops | None:
    """The work of the runs at POINTS within functions that are one operation each; null where there is none.

    Raises:
        InputError: as joined.
    """
    if not runs[0].inside[0].tensors:
        return None
    forward, backward = zip(*(run.inside for run in runs), strict=True)
    return TracedLoops(forward=_loop_work(forward), backward=_loop_work(backward))


def _loop_work(found: Sequence[Work]) -> LoopWork:
    """Tensors made are those of a row, whose loops go along its length, for any number of rows."""
    short, long = found[0].tensors, found[2].tensors
    slope = (long - short) / (POINTS[2].length - POINTS[0].length)
    written = _bytes([one.written_bytes for one in found])
    return LoopWork(short - slope * POINTS[0].length, slope, written)


def _with_buffers(operation: TracedOperation, buffers: Sequence[int]) -> TracedOperation:
    return replace(operation, buffers=tuple(buffers))


def _bytes(found: Sequence[int]) -> BufferBytes:
    """Coefficients of bytes at POINTS. What a row has whatever its length (a state, the padding of a
    convolution) is counted once, with the constant: a tape has no term for it.
    """
    once, short, between, long = _rows(found)
    first, step = POINTS[0].length, POINTS[3].length - POINTS[0].length
    per_score = (short - 2 * between + long) / (2 * step**2)
    per_token = (between - short) / step - per_score * (first + POINTS[3].length)
    per_row = short - per_token * first - per_score * first**2
    if min(once, per_score, per_token, per_row) < -TOLERANCE:
        return _line_above(found)
    return (max(0.0, once + per_row), max(0.0, per_token), max(0.0, per_score))


def _rows(found: Sequence[int]) -> tuple[float, float, float, float]:
    """Bytes that are there once, and those of a row of each length, the shortest first."""
    few, many, longer, middle = found
    short = (many - few) / (POINTS[1].batch - POINTS[0].batch)
    once = few - short * POINTS[0].batch
    return once, short, (middle - once) / POINTS[3].batch, (longer - once) / POINTS[2].batch


def _line_above(found: Sequence[int]) -> BufferBytes:
    """A line that no point is above, for the most of several moments that grow apart: its slope is that at
    the greatest lengths.

    Raises:
        InputError: the bytes shrink where sequences are longer.
    """
    _, _, between, long = _rows(found)
    slope = (long - between) / (POINTS[2].length - POINTS[3].length)
    if slope < 0:
        raise InputError(f"bytes of a buffer, {found}, do not grow with tokens or their squares")
    above = max(size - slope * point.tokens for size, point in zip(found, POINTS, strict=True))
    return (max(0.0, above), slope, 0.0)


TOLERANCE = 1e-6
"""Of what is computed from whole numbers of bytes."""
