"""The output head's and the loss's requests in order, as in the traces (tests/stack/traces)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.base.units import FP32
from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.head import ROW_STATISTICS, HeadShape

INDEX_BYTES = 16
"""Bytes a row of the two int64 coordinates that pick the rows with a label."""


class HeadReplay:
    """TRL's tiled log-probabilities for one setup's micro-step, every label counted."""

    def __init__(self, shape: HeadShape) -> None:
        weight = shape.hidden_size * shape.vocab_size
        self.trained, self.copy_bytes = shape.trained, shape.copy_bytes
        self.rows = shape.rows
        self.tile_bytes = shape.tile_bytes
        self.hidden_cast_bytes = shape.hidden_cast_bytes
        self.piece_bytes = shape.piece_bytes
        self.narrows = shape.hidden_width != FP32
        self.selected_bytes = shape.rows * shape.hidden_size * shape.hidden_width
        self.row_gradient_bytes = shape.rows * shape.hidden_size * FP32
        self.normed_bytes = shape.tokens * shape.hidden_size * shape.hidden_width
        self.weight_bytes = weight * shape.weight_width
        self.wide_weight_bytes = weight * FP32

    @property
    def largest_bytes(self) -> int:
        """The largest block of both passes."""
        weight = self.wide_weight_bytes if self.trained else 0
        return max(self.tile_bytes, self.row_gradient_bytes, self.normed_bytes, weight, self.piece_bytes)

    def run(
        self,
        allocator: CachingAllocator,
        normed: int,
        casts: Sequence[int],
        *,
        workspace_bytes: int,
        later: bool,
        between: Callable[[], None] | None = None,
        reference: Callable[[], None] | None = None,
    ) -> tuple[int, list[int]]:
        """Forward and backward; lets go of `normed` and, as autocast ends, of `casts`. `between` is what else
        comes between the two, `reference` a forward pass within autocast.

        `workspace_bytes` is taken by the autograd thread's first product (0: it has its workspace). Returns
        the normed states' gradient and the trained weight's (none with `later`, where it is added in place).
        """
        take, free = allocator.allocate, allocator.free
        copy = take(self.copy_bytes) if self.copy_bytes else None
        kept = self._forward(allocator)
        if reference is not None:
            free(normed)
            reference()
        for block in casts if reference is not None else (*casts, normed):
            free(block)
        if between is not None:
            between()
        row_gradient = take(self.row_gradient_bytes)
        wide = take(self.wide_weight_bytes) if self.trained else None
        tile = take(self.tile_bytes)
        if workspace_bytes:
            take(workspace_bytes)
        self._casts(allocator, pieces=2)
        narrow = take(self.selected_bytes) if self.narrows else row_gradient
        gradients = []
        same = self.weight_bytes == self.wide_weight_bytes
        if wide is not None:
            gradients.append(wide if same else take(self.weight_bytes))
        if self.narrows:
            free(row_gradient)
        if wide is not None and not same:
            free(wide)
        for block in (tile, *kept):
            free(block)
        if copy is not None:
            free(copy)
        if (later or copy is not None) and gradients:
            free(gradients.pop())
        scaled = take(self.selected_bytes)
        free(narrow)
        padded = take(self.normed_bytes)
        free(scaled)
        return padded, gradients

    def forward(self, allocator: CachingAllocator, normed: int) -> None:
        """The pass of an evaluation; lets go of `normed`."""
        copy = [allocator.allocate(self.copy_bytes)] if self.copy_bytes else []
        for block in (*self._forward(allocator), normed, *copy):
            allocator.free(block)

    def _forward(self, allocator: CachingAllocator) -> list[int]:
        """Rows with a label, their statistics and one tile; returns what backward needs."""
        take, free = allocator.allocate, allocator.free
        index = take(self.rows * INDEX_BYTES)
        selected = take(self.selected_bytes)
        free(index)
        labels = take(self.rows * 2 * FP32)
        statistics = [take(self.rows * FP32) for _ in range(ROW_STATISTICS - 1)]
        tile = take(self.tile_bytes)
        self._casts(allocator, pieces=1)
        kept = [selected, labels, take(self.rows * FP32), take(self.rows * FP32)]
        for block in (*statistics, tile):
            free(block)
        return kept

    def _casts(self, allocator: CachingAllocator, *, pieces: int) -> None:
        """Copies in the compute dtype: a tile's hidden states, and so many pieces of the weight at a time."""
        sizes = (self.hidden_cast_bytes, *[self.piece_bytes] * pieces)
        blocks = [allocator.allocate(size) for size in sizes if size]
        for block in blocks:
            allocator.free(block)
