"""Loading a model and giving it an adapter, through the allocator: the state that training starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from planner.base.units import DTYPE_BYTES, FP32
from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.trainables import Trainables, TrainableTensor
from planner.memory.held.weights import loaded_weights
from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup

TRL_ADAPTER_BYTES = 2
"""TRL casts the adapter of a quantised base to bfloat16 (sft_trainer.py:908)."""

_LOADED: dict[tuple[object, ...], tuple[CachingAllocator, int, int]] = {}


def loaded_allocator(
    setup: TrainingSetup, model: ModelSpec, trained: Trainables, allocator: str
) -> tuple[CachingAllocator, int, int]:
    """An allocator as training finds it; allocated bytes at most and reserved bytes after loading."""
    width = DTYPE_BYTES[setup.dtype]
    key = (
        model.id,
        model.parameter_count,
        setup.method,
        setup.dtype,
        setup.bnb_4bit_use_double_quant,
        setup.lora_r,
        setup.target_modules,
        setup.use_dora,
        setup.prepare_for_kbit_training,
        allocator,
    )
    known = _LOADED.get(key)
    if known is None:
        loaded = loaded_weights(setup, model, allocator)
        state = loaded.allocator.copy()
        peak, reserved = state.peak_allocated_bytes, state.reserved_bytes
        if setup.prepare_for_kbit_training and width < FP32:
            _upcast(state, loaded.plain)
        if setup.uses_lora:
            _add_adapter(state, setup, model, trained, width)
        # The trainer begins with accelerator.free_memory() (transformers trainer.py:1593).
        state.empty_cache()
        known = _LOADED[key] = (state, peak, reserved)
    return known[0].copy(), known[1], known[2]


def _upcast(allocator: CachingAllocator, plain: Sequence[tuple[int, int]]) -> None:
    """PEFT's k-bit preparation: whatever is not quantised is cast to fp32, one parameter after the other."""
    for address, elements in plain:
        allocator.allocate(elements * FP32)
        allocator.free(address)


def _add_adapter(
    allocator: CachingAllocator, setup: TrainingSetup, model: ModelSpec, trained: Trainables, width: int
) -> None:
    """PEFT puts every tensor on the GPU (fp32 beside 4-bit weights, else in the base's dtype), then all are
    cast, one by one: by PEFT to fp32 (tuners_utils.py, cast_adapter_dtype), by TRL to bfloat16 on a quantised
    base, and by the launcher back to fp32 where that trains in float16.
    """
    quantized = setup.method == "qlora"
    widths = [FP32, TRL_ADAPTER_BYTES] if quantized else [width, FP32]
    if widths[-1] != trained.element_bytes:
        widths.append(trained.element_bytes)
    if widths[0] == widths[1]:
        widths.pop(0)
    tensors = list(in_module_order(trained, model.num_hidden_layers))
    # DoRA's magnitudes are fp32 from the start.
    own = [FP32 if tensor.element_bytes != trained.element_bytes else 0 for tensor in tensors]
    blocks = [allocator.allocate(t.elements * (o or widths[0])) for t, o in zip(tensors, own, strict=True)]
    for following in widths[1:]:
        for index, tensor in enumerate(tensors):
            if own[index]:
                continue
            cast = allocator.allocate(tensor.elements * following)
            allocator.free(blocks[index])
            blocks[index] = cast


def in_module_order(trained: Trainables, layers: int) -> Iterator[TrainableTensor]:
    """Trained tensors one at a time: before, inside and after the decoder layers."""
    tensors = trained.tensors
    inside = [index for index, tensor in enumerate(tensors) if tensor.in_decoder_layer]
    first = inside[0] if inside else len(tensors)
    yield from tensors[:first]
    for layer in range(layers):
        for index in inside:
            if layer < tensors[index].count:
                yield tensors[index]
    yield from (tensor for tensor in tensors[first:] if not tensor.in_decoder_layer)
