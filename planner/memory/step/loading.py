"""Loading a model and giving it an adapter, through the allocator: the state that training starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from planner.base.units import FP32
from planner.base.values import dataclass
from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.weights import loaded_weights, scales_bytes
from planner.models.spec import ModelSpec
from planner.models.storage import Storage
from planner.setup.adapters import Adapter
from planner.setup.run import TrainingRun
from planner.setup.stack import Stack
from planner.setup.trained import TrainedTensor, trained_tensors


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """The allocator as training finds it, with what loading allocated at most and had reserved at its end."""

    allocator: CachingAllocator
    peak_bytes: int
    reserved_bytes: int


def loaded_allocator(run: TrainingRun, allocator: str) -> LoadedAdapter:
    """Loading a run's model and adapter; the caller copies the allocator to go on with it."""
    if run.parallelism.shards:
        from planner.memory.held.sharded_weights import sharded_weights

        sharded = sharded_weights(run.kind, allocator)
        return LoadedAdapter(sharded.allocator, sharded.peak_bytes, sharded.reserved_bytes)
    upcasts = run.setup.prepare_for_kbit_training
    scales = scales_bytes(run.kind)
    copies = run.kind.holds_reference
    return _loaded(run.model, run.storage, run.adapter, run.stack, upcasts, scales, allocator, copies)


@lru_cache(maxsize=512)
def _loaded(
    model: ModelSpec,
    storage: Storage,
    adapter: Adapter | None,
    stack: Stack,
    upcasts: bool,
    scales: tuple[int, ...],
    allocator: str,
    copies: bool,
) -> LoadedAdapter:
    loaded = loaded_weights(model, storage, allocator)
    state = loaded.allocator.copy()
    peak, reserved = state.peak_allocated_bytes, state.reserved_bytes
    if upcasts and storage.width < FP32:
        _upcast(state, loaded.plain)
    if adapter is not None:
        _add_adapter(state, model, storage, adapter, stack)
    if copies:
        # The trainer loads the reference, a second model, as it did the first.
        state.allocate_all(elements * storage.width for _, elements in loaded.plain)
    state.allocate_all(scales)
    # The trainer begins with accelerator.free_memory() (transformers trainer.py:1593).
    state.empty_cache()
    return LoadedAdapter(state, peak, reserved)


def _upcast(allocator: CachingAllocator, plain: Sequence[tuple[int, int]]) -> None:
    """PEFT's k-bit preparation: whatever is not quantised is cast to fp32, one parameter after the other."""
    allocator.replace_all([address for address, _ in plain], [elements * FP32 for _, elements in plain])


def _add_adapter(
    allocator: CachingAllocator, model: ModelSpec, storage: Storage, adapter: Adapter, stack: Stack
) -> None:
    """PEFT puts every tensor on the GPU (fp32 beside 4-bit weights, else in the base's dtype), then all are
    cast, one by one: by PEFT to fp32 (tuners_utils.py, cast_adapter_dtype), by the stack on a quantised base,
    and by the launcher back to fp32 where that trains in float16.
    """
    trained = trained_tensors(model, adapter, storage.width)
    widths = [FP32, stack.adapter_width] if storage.quantized else [storage.width, FP32]
    if widths[-1] != trained.element_width:
        widths.append(trained.element_width)
    if widths[0] == widths[1]:
        widths.pop(0)
    tensors = list(in_module_order(trained.held, model.num_hidden_layers))
    # DoRA's magnitudes are fp32 from the start, and what is trained beside an adapter has its width.
    own = [t.element_width if t.uncast or t.element_width != trained.element_width else 0 for t in tensors]
    blocks = allocator.allocate_all(t.elements * (o or widths[0]) for t, o in zip(tensors, own, strict=True))
    cast = [block for block, fixed in zip(blocks, own, strict=True) if not fixed]
    elements = [tensor.elements for tensor, fixed in zip(tensors, own, strict=True) if not fixed]
    for following in widths[1:]:
        cast = allocator.replace_all(cast, [count * following for count in elements])


def in_module_order(tensors: Sequence[TrainedTensor], layers: int) -> Iterator[TrainedTensor]:
    """Tensors one at a time: before, inside and after the decoder layers."""
    inside = [index for index, tensor in enumerate(tensors) if tensor.in_decoder_layer]
    first = inside[0] if inside else len(tensors)
    yield from tensors[:first]
    for layer in range(layers):
        for index in inside:
            if layer < tensors[index].count:
                yield tensors[index]
    yield from (tensor for tensor in tensors[first:] if not tensor.in_decoder_layer)
