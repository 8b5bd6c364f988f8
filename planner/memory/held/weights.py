"""Weights: what the loaded model holds, by kind, and what torch's allocator counts for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from planner.base.units import FP32
from planner.base.values import dataclass
from planner.memory.allocators.expandable import empty_allocator
from planner.memory.allocators.native import CachingAllocator
from planner.models.spec import ModelSpec, Parameter
from planner.models.storage import NESTED_BLOCK, QUANTIZATION_BLOCK, Storage
from planner.setup.run import TrainingRun

CODE_BYTES = 16 * 4
NESTED_CODE_BYTES = 256 * 4
OFFSET_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMemory:
    """Bytes of the loaded model: 4-bit weights, their constants, what stays in 16 (or 32) bits.

    `allocated_bytes` is torch.cuda.memory_allocated() after loading: the sum with rounding and unsplit tails.
    `largest_bytes` is the largest tensor that passes through the GPU unquantised while loading.
    """

    quantized_bytes: int
    constants_bytes: int
    unquantized_bytes: int
    allocated_bytes: int
    largest_bytes: int

    @property
    def rounding_bytes(self) -> int:
        """What the allocator adds to the tensors."""
        return self.allocated_bytes - self.quantized_bytes - self.constants_bytes - self.unquantized_bytes


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """The allocator as loading leaves it; address and elements of each parameter that is not quantised."""

    memory: WeightMemory
    allocator: CachingAllocator
    plain: tuple[tuple[int, int], ...]


def upcast_bytes(run: TrainingRun) -> int:
    """What PEFT's prepare_model_for_kbit_training adds: every parameter that is not quantised becomes fp32.

    Source: peft/utils/other.py, prepare_model_for_kbit_training.
    """
    if not run.setup.prepare_for_kbit_training:
        return 0
    storage = run.storage
    kept = (p for p in run.model.parameters if not p.tied and not storage.quantizes(p))
    return (FP32 - storage.width) * sum(p.elements * p.count for p in kept)


@lru_cache(maxsize=512)
def largest_quantized_bytes(model: ModelSpec, storage: Storage) -> int:
    """The largest weight that is quantised, whole again; 0 where none is."""
    sizes = (p.elements * storage.width for p in model.parameters if storage.quantizes(p))
    return max(sizes, default=0)


@lru_cache(maxsize=512)
def loaded_weights(model: ModelSpec, storage: Storage, allocator: str) -> LoadedWeights:
    """Loading a base model, replayed with one of torch's allocators; the caller copies it to go on."""
    state = empty_allocator(allocator)
    blocks = []
    packed = constants = plain = largest = 0
    for parameter in _in_module_order(model):
        size = parameter.elements * storage.width
        largest = max(largest, size)
        if storage.quantizes(parameter):
            temporary = state.allocate(size)
            packed_bytes, constant_bytes = _quantize(state, parameter.elements, storage.double_quant)
            state.free(temporary)
            packed += packed_bytes
            constants += constant_bytes
        else:
            blocks.append((state.allocate(size), parameter.elements))
            plain += size
    memory = WeightMemory(
        quantized_bytes=packed,
        constants_bytes=constants,
        unquantized_bytes=plain,
        allocated_bytes=state.allocated_bytes,
        largest_bytes=largest,
    )
    return LoadedWeights(memory, state, tuple(blocks))


def _quantize(allocator: CachingAllocator, elements: int, double_quant: bool) -> tuple[int, int]:
    """Replay bitsandbytes' quantize_4bit of one weight; returns packed and constant bytes."""
    packed_bytes, blocks = (elements + 1) // 2, -(-elements // QUANTIZATION_BLOCK)
    absmax = allocator.allocate(blocks * 4)
    allocator.allocate(packed_bytes)
    allocator.allocate(CODE_BYTES)
    if not double_quant:
        return packed_bytes, blocks * 4 + CODE_BYTES
    allocator.allocate(OFFSET_BYTES)
    shifted = allocator.allocate(blocks * 4)
    allocator.allocate(NESTED_CODE_BYTES)
    nested = -(-blocks // NESTED_BLOCK) * 4
    allocator.allocate(nested)
    allocator.allocate(blocks)
    allocator.free(shifted)
    allocator.free(absmax)
    return packed_bytes, blocks + nested + CODE_BYTES + OFFSET_BYTES + NESTED_CODE_BYTES


def _in_module_order(model: ModelSpec) -> Iterator[Parameter]:
    """Parameters one tensor at a time, as the model's modules come: before, inside and after the layers."""
    listed = [parameter for parameter in model.parameters if not parameter.tied]
    inside = [index for index, parameter in enumerate(listed) if parameter.in_decoder_layer]
    first, last = (inside[0], inside[-1]) if inside else (len(listed), len(listed))
    yield from listed[:first]
    layer_parameters = [parameter for parameter in listed[first : last + 1] if parameter.in_decoder_layer]
    for layer in range(model.num_hidden_layers):
        for parameter in layer_parameters:
            if layer < parameter.count:
                yield parameter
    yield from (parameter for parameter in listed[first:] if not parameter.in_decoder_layer)
