"""The requests of a head of one score a token (planner/memory/held/score.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.head import HeadShape


class ScoreReplay:
    """transformers' score of sequences for one setup's micro-step."""

    def __init__(self, shape: HeadShape) -> None:
        hidden = shape.tokens * shape.hidden_size
        self.scores_bytes = shape.tokens * shape.compute_width
        self.gradient_bytes = hidden * shape.compute_width
        self.normed_bytes = hidden * shape.hidden_width
        self.weight_bytes = shape.hidden_size * shape.weight_width
        self.casts = shape.hidden_width != shape.compute_width

    @property
    def largest_bytes(self) -> int:
        """The largest block of both passes."""
        return max(self.normed_bytes, self.gradient_bytes)

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
        """Forward and backward, as HeadReplay.run: the normed states' gradient and the weight's."""
        take, free = allocator.allocate, allocator.free
        scores, own_casts = self._forward(allocator)
        if reference is not None:
            reference()
        for block in casts:
            free(block)
        if between is not None:
            between()
        spread = take(self.scores_bytes)
        free(scores)
        if workspace_bytes:
            take(workspace_bytes)
        gradient, weight = take(self.gradient_bytes), take(self.weight_bytes)
        for block in (spread, *own_casts, normed):
            free(block)
        if self.casts:
            cast = take(self.normed_bytes)
            free(gradient)
            gradient = cast
        if later:
            free(weight)
        return gradient, [] if later else [weight]

    def forward(self, allocator: CachingAllocator, normed: int) -> None:
        """The pass of an evaluation; lets go of `normed`."""
        scores, casts = self._forward(allocator)
        for block in (scores, *casts, normed):
            allocator.free(block)

    def _forward(self, allocator: CachingAllocator) -> tuple[int, list[int]]:
        casts = [allocator.allocate(self.gradient_bytes)] if self.casts else []
        return allocator.allocate(self.scores_bytes), casts
