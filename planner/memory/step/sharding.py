"""FSDP2 in the allocator's replay: units gathered and let go, gradients sent and their shares kept.

Buffers that units arrive in lie in the pool of the stream that copies into them, shares of gradients in that
of the stream that reduces them; gathered parameters and gradients as they are sent, in the compute stream's
(torch distributed/fsdp/_fully_shard: _fsdp_collectives.py, foreach_all_gather and foreach_reduce;
_fsdp_param_group.py, wait_for_unshard, post_backward, _backward_prefetch).
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.shards import Unit, units_of
from planner.setup.run import TrainingRun

_ENDS, _EMBEDDING = -1, -2
"""Keys of the units beside the layers, whose keys are their positions."""


class ShardReplay:
    """One run's units in whole steps; `compute` is the allocator of everything else."""

    def __init__(self, run: TrainingRun, compute: CachingAllocator) -> None:
        units = units_of(run)
        self.compute = compute
        self.arriving, self.reducing = type(compute)(), type(compute)()
        self._layers, self._embedding, self._head = units.layers, units.embedding, units.head
        self._tied = run.model.tied_embeddings
        self._loss_gathers_bytes = units.gathered_head_bytes
        self._casts = run.held_width != run.reduce_width and run.adapter is None
        self._each_micro_step = run.parallelism.sharding.each_micro_step
        self.peak_bytes = 0
        self._flat: int | None = None
        """The buffer of the unit gathered last in the forward pass, of the next one in the backward pass."""
        self._ends: list[int] = []
        self._head_block: int | None = None
        self._gathered: list[int] = []
        self._sent: int | None = None
        self._shares: dict[int, int] = {}
        self._whole: dict[int, list[int]] = {}

    @property
    def takes_all(self) -> bool:
        """Whether every micro-step's gradients are sent, so that none is added to a whole one."""
        return self._each_micro_step

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the other streams' pools."""
        return self.arriving.reserved_bytes + self.reducing.reserved_bytes

    @property
    def largest_bytes(self) -> int:
        """The largest block that gathering or sending asks for."""
        units = (*self._layers, self._embedding, self._head)
        return max(self._loss_gathers_bytes, *(max(unit.flat_bytes, unit.gradient_bytes) for unit in units))

    def reset_peak(self) -> None:
        """Begin a step."""
        self.peak_bytes = 0
        self.compute.reset_peak()

    def mark(self) -> None:
        """Take into the peak what was handed out since the last mark: other pools change at marks only."""
        others = self.arriving.allocated_bytes + self.reducing.allocated_bytes
        self.peak_bytes = max(self.peak_bytes, self.compute.peak_allocated_bytes + others)
        self.compute.reset_peak()

    def before_embedding(self) -> None:
        """Gather a sharded embedding; tied, it stays, and head and norm with it."""
        if self._tied and self._head.parameters:
            self._arrive(self._head)
            self._ends = self._copy_out(self._head)
        elif self._embedding.parameters:
            self._arrive(self._embedding)
            self._gathered = self._copy_out(self._embedding)

    def after_embedding(self) -> None:
        """Let a sharded embedding go."""
        self.mark()
        self._let_go()

    def before_forward(self, index: int) -> None:
        """Gather a layer; the buffer of the one before goes first."""
        self.mark()
        previous = self._flat
        self._flat = self.arriving.allocate(self._layers[index].flat_bytes)
        self.mark()
        if previous is not None:
            self.arriving.free(previous)
        self._gathered = self._copy_out(self._layers[index])

    def after_forward(self) -> None:
        """Let a layer go."""
        self.mark()
        self._let_go()

    def before_head(self) -> None:
        """Gather what the loss needs, beside the last layer's buffer; its own is let go when forward ends."""
        self.mark()
        if self._head.parameters and not self._tied:
            previous = self._flat
            self._arrive(self._head)
            if previous is not None:
                self.arriving.free(previous)
            self._ends = self._copy_out(self._head)
        if self._loss_gathers_bytes:
            self._head_block = self.compute.allocate(self._loss_gathers_bytes)

    def end_forward(self) -> None:
        """The model's forward pass has returned: the last buffer goes."""
        self.mark()
        if self._flat is not None:
            self.arriving.free(self._flat)
            self._flat = None

    def after_head(self, gradients: Sequence[int], *, last: bool) -> None:
        """The head's backward pass is done; its gradients are sent in the `last` micro-step."""
        self.mark()
        if self._head_block is not None:
            self.compute.free(self._head_block)
            self._head_block = None
        if self._tied:
            self._whole.setdefault(_ENDS, []).extend(gradients)
            return
        self._let_ends_go()
        self._send(_ENDS, self._head, gradients, last=last)

    def before_backward(self, index: int) -> None:
        """Gather a layer, if it is not on its way already, then send for the one below."""
        self.mark()
        if self._flat is None:
            self._flat = self.arriving.allocate(self._layers[index].flat_bytes)
        self._gathered = self._copy_out(self._layers[index])
        self.arriving.free(self._flat)
        below = self._layers[index - 1] if index else self._embedding
        self._flat = self.arriving.allocate(below.flat_bytes) if below.parameters else None

    def after_backward(self, index: int, gradients: Sequence[int], *, last: bool) -> None:
        """Let a layer go, and send its gradients in the last micro-step."""
        self.mark()
        self._let_go()
        self._send(index, self._layers[index], gradients, last=last)

    def end_backward(self, gradients: Sequence[int], *, last: bool) -> None:
        """The end of a backward pass: the embedding's gradient is sent, what is gathered goes."""
        self.mark()
        if self._flat is not None:
            self.arriving.free(self._flat)
            self._flat = None
        self._let_ends_go()
        if self._tied:
            self._send(_ENDS, self._head, gradients, last=last)
        else:
            self._send(_EMBEDDING, self._embedding, gradients, last=last)
        if self._sent is not None:
            self.compute.free(self._sent)
            self._sent = None
        self.mark()

    def zero_grad(self) -> None:
        """Let go of the shares of gradients."""
        for block in self._shares.values():
            self.reducing.free(block)
        self._shares = {}

    def _arrive(self, unit: Unit) -> None:
        self._flat = self.arriving.allocate(unit.flat_bytes)

    def _copy_out(self, unit: Unit) -> list[int]:
        return [self.compute.allocate(size) for size in unit.parameters]

    def _let_go(self) -> None:
        for block in self._gathered:
            self.compute.free(block)
        self._gathered = []

    def _let_ends_go(self) -> None:
        for block in self._ends:
            self.compute.free(block)
        self._ends = []

    def _send(self, key: int, unit: Unit, gradients: Sequence[int], *, last: bool) -> None:
        """Send a unit's whole gradients, those of earlier micro-steps too: they go once they are in one
        buffer, which waits for the next unit's. Before the last micro-step they may stay.
        """
        whole = [*self._whole.pop(key, ()), *gradients]
        if not last and not self._each_micro_step:
            self._whole[key] = whole
            return
        if self._sent is not None:
            self.compute.free(self._sent)
            self._sent = None
        if not unit.gradients:
            return
        self._sent = self.compute.allocate(unit.gradient_bytes)
        for block in whole:
            self.compute.free(block)
        share = self.reducing.allocate(unit.received_bytes)
        if self._casts:
            wide = self.reducing.allocate(unit.reduced_bytes)
            self.reducing.free(share)
            share = wide
        self.mark()
        if key in self._shares:
            # Added to what earlier micro-steps have left.
            self.reducing.free(share)
        else:
            self._shares[key] = share
