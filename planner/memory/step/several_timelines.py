"""Timelines of a step of one of several GPUs: what FSDP2 has gathered at each moment and whose gradients are
whole; what DDP's buckets are.

With FSDP2 a unit's buffer is let go in the forward pass when the next one has been copied out of its own; in
the backward pass the unit below is on its way while one is at work (torch
distributed/fsdp/_fully_shard/_fsdp_param_group.py). With DDP a gradient is made, copied into its bucket and
let go. Micro-steps before the last do not use the buckets: their gradients are tensors of their own until the
last one copies them (torch csrc/distributed/c10d/reducer.cpp, autograd_hook and mark_variable_ready_dense;
transformers sets gradients to None after a step).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from planner.memory.held.shards import Unit, Units, units_of
from planner.memory.step.timeline import AtWork, StepMoment, StepTimeline
from planner.setup.run import TrainingRun


def timeline_of_several(run: TrainingRun, parts: dict[str, Any]) -> StepTimeline:
    """The timeline of a run on several GPUs, of what StepTimeline is made of."""
    if not run.parallelism.shards:
        return ReplicatedTimeline(**parts)
    each = run.parallelism.sharding.each_micro_step
    return ShardedTimeline(units=units_of(run), each_micro_step=each, **parts)


class ReplicatedTimeline(StepTimeline):
    """Moments of a step of one of several GPUs that hold the same."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        if not self.shape.accumulating:
            self._gradients = [0.0 for _ in self._gradients]
            self._all_gradients = 0

    def optimizer_step(self, temporary_bytes: int) -> StepMoment:
        """What the optimizer needs for a moment: gradients are in the buckets."""
        return StepMoment(
            name="optimizer step",
            kept_bytes=0,
            live_bytes=0,
            workspace_bytes=temporary_bytes,
            gradient_bytes=0,
        )


class ShardedTimeline(StepTimeline):
    """Moments of a step of one of several GPUs that share the weights out."""

    def __init__(self, *, units: Units, each_micro_step: bool, **rest: Any) -> None:
        self.units = units
        super().__init__(**rest)
        self._all_gradients = units.reduced_bytes
        accumulating = self.shape.accumulating
        self._keeps_whole = accumulating and not each_micro_step
        self._earlier = 0
        if accumulating:
            self._earlier = units.gradient_bytes if self._keeps_whole else units.reduced_bytes
        # Norm, head and, tied, the embedding stay gathered from the forward to the backward pass.
        self._ends_gathered = units.head.gathered_bytes

    @property
    def pool_bytes(self) -> int:
        """What the pool of the stream that gathers holds at most: two units' buffers, one on its way."""
        layers = self.units.layers
        flat = [self.units.embedding.flat_bytes, *(unit.flat_bytes for unit in layers)]
        flat.append(self.units.head.flat_bytes)
        return max(a + b for a, b in pairwise(flat))

    def forward_only(self) -> StepMoment:
        """The peak of a forward pass that keeps nothing (evaluation)."""
        unit = max(self.units.layers, key=lambda one: one.gathered_bytes)
        found = super().forward_only()
        gathered = unit.flat_bytes + (self._head_gathered if found.head_bytes else unit.gathered_bytes)
        return found._replace(gathered_bytes=gathered + (0 if found.head_bytes else self._tied_gathered))

    def moments(self) -> list[StepMoment]:
        """Every moment that can be the peak, that of a sharded embedding among them."""
        embedding = self.units.embedding
        first = StepMoment(
            name="forward of the embedding",
            kept_bytes=0,
            live_bytes=self.shape.hidden_bytes_per_token * self.shape.tokens,
            workspace_bytes=0,
            gradient_bytes=self._earlier,
            gathered_bytes=embedding.gathered_bytes + embedding.flat_bytes,
        )
        return [first, *super().moments()] if embedding.parameters else super().moments()

    @property
    def _tied_gathered(self) -> int:
        """What is gathered all along a micro-step: the embedding, where it is the head's own tensor."""
        return self._ends_gathered if self.tied else 0

    @property
    def _head_gathered(self) -> int:
        """The head as it is computed with."""
        return self._ends_gathered or self.units.gathered_head_bytes

    def _gradients_above(self, index: int) -> int:
        """Shares of the gradients of the layers above, or of all in later micro-steps, and what the layer
        above has sent; whole ones of those that are still to come where only the last micro-step sums them.
        """
        layers, head = self.units.layers, self.units.head
        sent = layers[index + 1] if index + 1 < len(layers) else head
        if self.shape.accumulating and not self._keeps_whole:
            return self._all_gradients + sent.gradient_bytes
        found = sum(unit.reduced_bytes for unit in layers[index + 1 :]) + head.reduced_bytes
        if self._keeps_whole:
            found += self.units.embedding.gradient_bytes
            found += sum(unit.gradient_bytes for unit in layers[: index + 1])
        return found + sent.gradient_bytes

    def _head_moments(self) -> list[StepMoment]:
        last = self.units.layers[-1].flat_bytes
        # The norm's unit is the head's where all weights are trained: its own buffer is the last one then.
        flat = self.units.head.flat_bytes if self.units.head.parameters and not self.tied else last
        found = []
        for moment in super()._head_moments():
            backward = "backward" in moment.name
            gathered = self._head_gathered if "head" in moment.name or self._ends_gathered else 0
            gradients = self._earlier if self.shape.accumulating else moment.gradient_bytes
            gathered += 0 if backward else flat
            found.append(moment._replace(gathered_bytes=gathered, gradient_bytes=gradients))
        return found

    def _layer_moment(self, index: int, own: int, work: AtWork, *, backward: bool = True) -> StepMoment:
        found = super()._layer_moment(index, own, work, backward=backward)
        unit = self.units.layers[index]
        below = self.units.layers[index - 1] if index else self.units.embedding
        flat = below.flat_bytes if backward else unit.flat_bytes
        gradients = found.gradient_bytes
        if not backward and self.shape.accumulating:
            gradients += self._earlier - self._all_gradients
        return found._replace(
            gathered_bytes=unit.gathered_bytes + flat + self._tied_gathered,
            gradient_bytes=gradients,
        )

    def _embedding_backward(self) -> StepMoment:
        found = super()._embedding_backward()
        unit: Unit = self.units.head if self.tied else self.units.embedding
        return found._replace(
            gradient_bytes=self._all_gradients + unit.gradient_bytes,
            gathered_bytes=unit.gathered_bytes,
        )
