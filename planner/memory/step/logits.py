"""The requests of a head that makes all logits at once, in the order of transformers' loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.base.units import FP32
from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.head import HeadShape
from planner.memory.held.logits import logits_bytes


class LogitsReplay:
    """transformers' head and loss for one setup's micro-step (planner/memory/held/logits.py)."""

    def __init__(self, shape: HeadShape) -> None:
        hidden = shape.tokens * shape.hidden_size
        weight = shape.hidden_size * shape.vocab_size
        self.trained, self.narrows = shape.trained, shape.narrows
        self.made_bytes = logits_bytes(shape, shape.compute_width)
        self.wide_bytes = logits_bytes(shape, FP32)
        self.hidden_cast_bytes = (
            hidden * shape.compute_width if shape.hidden_width != shape.compute_width else 0
        )
        self.weight_cast_bytes = (
            weight * shape.compute_width if shape.weight_width != shape.compute_width else 0
        )
        self.gradient_bytes = hidden * shape.compute_width
        self.normed_bytes = hidden * shape.hidden_width
        self.weight_bytes = weight * shape.weight_width

    @property
    def largest_bytes(self) -> int:
        """The largest block of both passes."""
        return max(self.wide_bytes, self.normed_bytes, self.weight_cast_bytes, self.weight_bytes)

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
        """Forward and backward, as HeadReplay.run: the normed states' gradient and the trained weight's."""
        take, free = allocator.allocate, allocator.free
        log_softmax, own_casts = self._forward(allocator)
        if reference is not None:
            reference()
        for block in casts:
            free(block)
        if not self.trained:
            free(normed)
        if between is not None:
            between()
        picked = take(self.wide_bytes)
        logits = take(self.wide_bytes)
        free(picked)
        free(log_softmax)
        if self.narrows:
            narrow = take(self.made_bytes)
            free(logits)
            logits = narrow
        if workspace_bytes:
            take(workspace_bytes)
        gradient = take(self.gradient_bytes)
        gradients = []
        if self.trained:
            gradients.append(take(self.weight_bytes))
            free(normed)
        free(logits)
        for block in own_casts:
            free(block)
        if later and gradients:
            free(gradients.pop())
        if self.hidden_cast_bytes:
            cast = take(self.normed_bytes)
            free(gradient)
            gradient = cast
        return gradient, gradients

    def forward(self, allocator: CachingAllocator, normed: int) -> None:
        """The pass of an evaluation; lets go of `normed`."""
        log_softmax, casts = self._forward(allocator)
        for block in (log_softmax, *casts, normed):
            allocator.free(block)

    def _forward(self, allocator: CachingAllocator) -> tuple[int, list[int]]:
        """Logits, their log-softmax and the copy that is handed on; what backward needs, and the casts."""
        take, free = allocator.allocate, allocator.free
        casts = [take(size) for size in (self.hidden_cast_bytes, self.weight_cast_bytes) if size]
        made = take(self.made_bytes)
        wide = take(self.wide_bytes) if self.narrows else made
        log_softmax = take(self.wide_bytes)
        if self.narrows:
            free(wide)
            handed_on = take(self.wide_bytes)
            free(made)
            free(handed_on)
        else:
            free(made)
        return log_softmax, casts
