"""Weights that are shared out while they are loaded, layer by layer: what a GPU then holds, and its most.

Order of launcher/training/several/sharded_model.py: a layer's adapters, then its weights, each quantised, are
put on the GPU whole; then fully_shard makes the shares, and what was whole goes when it returns.
"""

from __future__ import annotations

from functools import lru_cache

from planner.base.values import dataclass
from planner.memory.allocators.expandable import empty_allocator
from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.shards import Share, held_trained, share_of
from planner.memory.held.weights import (
    CODE_BYTES,
    NESTED_CODE_BYTES,
    OFFSET_BYTES,
    WeightMemory,
)
from planner.models.parameter import Parameter
from planner.models.spec import ModelSpec
from planner.models.storage import NESTED_BLOCK, QUANTIZATION_BLOCK, Storage
from planner.setup.parallelism import Parallelism
from planner.setup.run import RunKind
from planner.setup.trained import Trained, TrainedTensor


@dataclass(frozen=True, slots=True)
class ShardedWeights:
    """The allocator as loading leaves it, with the adapter's shares in it; the base's bytes; what loading
    allocated at most and reserved, before the cache was emptied.
    """

    memory: WeightMemory
    allocator: CachingAllocator
    peak_bytes: int
    reserved_bytes: int


def sharded_weights(run: RunKind, allocator: str) -> ShardedWeights:
    """Loading a run's model under FSDP2; the caller copies the allocator to go on with it."""
    return _load(
        run.model, run.storage, run.trained, run.parallelism, run.adapter is None, run.held_width, allocator
    )


@lru_cache(maxsize=512)
def _load(
    model: ModelSpec,
    storage: Storage,
    trained: Trained,
    parallelism: Parallelism,
    trains_all: bool,
    held_width: int,
    allocator: str,
) -> ShardedWeights:
    loading = _Loading(model, storage, parallelism, trains_all, held_width, allocator)
    adapters = [] if trains_all else [t for t in trained.tensors if t.in_decoder_layer]
    shares = {tensor.name: tensor for tensor in held_trained(trained, parallelism).tensors}
    listed = [parameter for parameter in model.parameters if not parameter.tied]
    for index in range(model.num_hidden_layers):
        own = [tensor for tensor in adapters if index < tensor.count]
        inside = [p for p in listed if p.in_decoder_layer and index < p.count]
        loading.unit(inside, own, [shares[tensor.name] for tensor in own])
    for parameter in listed:
        if not parameter.in_decoder_layer:
            loading.unit([parameter], [], [])
    state = loading.state
    memory = WeightMemory(
        quantized_bytes=loading.quantized,
        constants_bytes=loading.constants,
        unquantized_bytes=loading.unquantized,
        allocated_bytes=state.allocated_bytes - loading.adapter_bytes,
        largest_bytes=max((p.elements * storage.width for p in listed), default=0),
    )
    peak, reserved = state.peak_allocated_bytes, state.reserved_bytes
    state.empty_cache()
    return ShardedWeights(memory, state, peak, reserved)


class _Loading:
    def __init__(
        self,
        model: ModelSpec,
        storage: Storage,
        parallelism: Parallelism,
        trains_all: bool,
        held_width: int,
        allocator: str,
    ) -> None:
        self.state = empty_allocator(allocator)
        self.quantized = self.constants = self.unquantized = self.adapter_bytes = 0
        self._storage, self._parallelism = storage, parallelism
        self._trains_all, self._tied, self._held_width = trains_all, model.tied_embeddings, held_width

    def unit(
        self, parameters: list[Parameter], adapters: list[TrainedTensor], shares: list[TrainedTensor]
    ) -> None:
        """Load tensors whole, take their shares, let go of what was whole."""
        take = self.state.allocate
        whole = [take(tensor.size_bytes) for tensor in adapters]
        kept = []
        for parameter in parameters:
            share = share_of(
                parameter, self._storage, self._parallelism, trained=self._trains_all, tied=self._tied
            )
            if not share.on_host:
                whole += self._put(parameter, share)
                kept.append((parameter, share))
        for parameter, share in kept:
            self._share(parameter, share)
        before = self.state.allocated_bytes
        for tensor in shares:
            take(tensor.size_bytes)
        self.adapter_bytes += self.state.allocated_bytes - before
        for block in whole:
            self.state.free(block)

    def _put(self, parameter: Parameter, share: Share) -> list[int]:
        """One tensor whole on the GPU; returns the blocks that go when it has been shared out."""
        take, free = self.state.allocate, self.state.free
        if not self._storage.quantizes(parameter):
            if share.whole:
                return []
            return [
                take(parameter.elements * (self._held_width if self._trains_all else self._storage.width))
            ]
        blocks = -(-parameter.elements // QUANTIZATION_BLOCK)
        temporary = take(parameter.elements * self._storage.width)
        absmax = take(blocks * 4)
        packed = take((parameter.elements + 1) // 2)
        take(CODE_BYTES)
        self.constants += CODE_BYTES
        if self._storage.double_quant:
            take(OFFSET_BYTES)
            shifted = take(blocks * 4)
            nested = -(-blocks // NESTED_BLOCK) * 4
            take(NESTED_CODE_BYTES)
            take(nested)
            narrow = take(blocks)
            self.constants += OFFSET_BYTES + NESTED_CODE_BYTES + nested
            free(shifted)
            free(absmax)
            absmax = narrow
        free(temporary)
        if share.constants_bytes:
            return [packed, absmax]
        self.constants += blocks * (1 if self._storage.double_quant else 4)
        return [packed]

    def _share(self, parameter: Parameter, share: Share) -> None:
        """This GPU's share of a tensor that is there."""
        if self._storage.quantizes(parameter):
            self.state.allocate(share.tensor_bytes)
            self.quantized += share.tensor_bytes
            if share.constants_bytes:
                self.state.allocate(share.constants_bytes)
                self.constants += share.constants_bytes
            return
        size = share.tensor_bytes
        if self._trains_all:
            size = size // self._storage.width * self._held_width
        self.state.allocate(size)
        self.unquantized += size
