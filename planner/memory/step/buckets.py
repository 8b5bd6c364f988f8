"""DDP's buckets in the allocator's replay: as many bytes as the trained gradients, from before the first step
to the end.

One bucket holds all at first; with its second forward pass torch makes others, in the order in which
gradients come, and lets the first go before (torch nn/parallel/distributed.py;
csrc/distributed/c10d/reducer.cpp, rebuild_buckets).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from planner.base.units import MIB
from planner.memory.allocators.native import CachingAllocator
from planner.memory.step.loading import in_module_order
from planner.models.parameter import Parameter
from planner.setup.run import TrainingRun

FIRST_BUCKET_BYTES, BUCKET_BYTES = MIB, 25 * MIB
"""What closes the first bucket and the others (torch distributed/constants: _DEFAULT_FIRST_BUCKET_BYTES, and
bucket_cap_mb)."""

SENT_BYTES, SENT_AT_ONCE = 250 * MIB, 2
"""What closes a flat buffer of weights, and how many are there."""


class BucketReplay:
    """One run's buckets in an allocator, and what DDP sends before it makes them: all weights, flattened."""

    def __init__(self, run: TrainingRun, allocator: CachingAllocator) -> None:
        self._allocator = allocator
        tensors = list(in_module_order(run.trained.tensors, run.model.num_hidden_layers))
        self._sizes = [tensor.size_bytes for tensor in reversed(tensors)]
        self._blocks: list[int] = []
        self._send_all(run)

    def _send_all(self, run: TrainingRun) -> None:
        """The first GPU's weights for all others, in flat buffers by dtype, two of them at a time (torch
        csrc/distributed/c10d/comm.cpp, broadcast_coalesced; nn/parallel/distributed.py, _sync_module_states).
        """
        sent: deque[int] = deque()
        for size in _flat_bytes(_tensors(run)):
            sent.append(self._allocator.allocate(size))
            if len(sent) == SENT_AT_ONCE:
                self._allocator.free(sent.popleft())
        for block in sent:
            self._allocator.free(block)

    def begin_step(self, step: int) -> None:
        """Make the first bucket before the first step, the others before the second."""
        if step > 1:
            return
        for block in self._blocks:
            self._allocator.free(block)
        sizes = [sum(self._sizes)] if step == 0 else list(bucket_bytes(self._sizes))
        self._blocks = [self._allocator.allocate(size) for size in sizes]


def _tensors(run: TrainingRun) -> Iterator[tuple[str, int]]:
    """A run's weights in the order of its modules, adapters behind their layer's: dtype's name, and bytes."""
    storage, model = run.storage, run.model
    adapters = [] if run.adapter is None else run.trained.tensors
    width = 0 if run.adapter is None else run.adapter.width
    listed = [parameter for parameter in model.parameters if not parameter.tied]
    inside = [index for index, parameter in enumerate(listed) if parameter.in_decoder_layer]

    def sized(parameters: Iterable[Parameter]) -> Iterator[tuple[str, int]]:
        for one in parameters:
            if storage.quantizes(one):
                yield "packed", (one.elements + 1) // 2
            else:
                yield str(storage.width), one.elements * storage.width

    yield from sized(listed[: inside[0]])
    for layer in range(model.num_hidden_layers):
        yield from sized(listed[index] for index in inside if layer < listed[index].count)
        yield from ((str(width), one.size_bytes) for one in adapters if layer < one.count)
    yield from sized(listed[inside[-1] + 1 :])


def _flat_bytes(tensors: Iterable[tuple[str, int]]) -> list[int]:
    """Sizes of the flat buffers in the order in which they are sent, that of their first tensors. A tensor by
    itself is sent as it is (torch csrc/utils/tensor_flatten.h).
    """
    open_: dict[str, tuple[int, int, int]] = {}
    closed: list[tuple[int, int, int]] = []
    for place, (dtype, size) in enumerate(tensors):
        first, total, count = open_.pop(dtype, (place, 0, 0))
        one = (first, total + size, count + 1)
        if one[1] >= SENT_BYTES:
            closed.append(one)
        else:
            open_[dtype] = one
    return [total for _, total, count in sorted([*closed, *open_.values()]) if count > 1]


def bucket_bytes(sizes: Iterable[int]) -> Iterator[int]:
    """Sizes of the buckets of gradients that come in this order: one is closed once it reaches its limit."""
    limit, total = FIRST_BUCKET_BYTES, 0
    for size in sizes:
        total += size
        if total >= limit:
            yield total
            limit, total = BUCKET_BYTES, 0
    if total:
        yield total
