"""Runs of one block at several batches and lengths, joined: what each buffer's bytes grow with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from launcher.models.tracing.block import BlockRun
from planner.base.errors import InputError
from planner.models.traced import BufferBytes, TracedOperation, TracedPass


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


POINTS = (Point(1, 128), Point(2, 128), Point(1, 256), Point(3, 192))
"""The first two tell what a row costs from what is there once, the three lengths what of a row grows with its
length and with the square of that."""


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


def _with_buffers(operation: TracedOperation, buffers: Sequence[int]) -> TracedOperation:
    return replace(operation, buffers=tuple(buffers))


def _bytes(found: Sequence[int]) -> BufferBytes:
    """Coefficients of bytes at POINTS. What a row has whatever its length (a state, the padding of a
    convolution) is counted once, with the constant: a tape has no term for it.
    """
    one, two, longer, middle = found
    once = 2 * one - two
    short, between, long = two - one, (middle - once) / POINTS[3].batch, longer - once
    step = POINTS[3].length - POINTS[0].length
    per_score = (short - 2 * between + long) / (2 * step**2)
    per_token = (between - short) / step - per_score * (POINTS[0].length + POINTS[3].length)
    per_row = short - per_token * POINTS[0].length - per_score * POINTS[0].length ** 2
    if min(once, per_score, per_token, per_row) < -TOLERANCE:
        raise InputError(f"bytes of a buffer, {found}, do not grow with tokens or their squares")
    return (max(0.0, once + per_row), max(0.0, per_token), max(0.0, per_score))


TOLERANCE = 1e-6
"""Of what is computed from whole numbers of bytes."""
