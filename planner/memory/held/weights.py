"""Weights: what the loaded model holds, by kind, and what torch's allocator counts for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.base.units import DTYPE_BYTES, FP32
from planner.memory.allocators.expandable import empty_allocator
from planner.memory.allocators.native import CachingAllocator
from planner.models.spec import ModelSpec, Parameter
from planner.setup.training_setup import TrainingSetup

QUANTIZED_CLASSES = ("Linear", "Conv1D")
"""transformers replaces exactly these classes (integrations/bitsandbytes.py, replace_with_bnb_linear)."""
BLOCK = 64
"""Elements a quantisation constant covers (bitsandbytes nn/modules.py, Params4bit)."""
NESTED_BLOCK = 256
"""Constants a nested constant covers (bitsandbytes functional.py, quantize_4bit)."""
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


def is_output_head(parameter: Parameter) -> bool:
    """Whether the parameter belongs to the output head (a Linear outside the decoder layers)."""
    return parameter.module_class == "Linear" and not parameter.in_decoder_layer


def is_quantized(parameter: Parameter) -> bool:
    """Whether bitsandbytes holds the parameter in 4 bits.

    Kept in 16 bits: embeddings, norms, biases, routers, 3-D experts and the output head
    (transformers quantizers/base.py, get_keys_to_not_convert).
    """
    return (
        parameter.module_class in QUANTIZED_CLASSES
        and parameter.kind == "weight"
        and not is_output_head(parameter)
    )


def weight_memory(setup: TrainingSetup, model: ModelSpec, allocator: str) -> WeightMemory:
    """Memory of the loaded base model of a setup, with one of torch's allocators."""
    return loaded_weights(setup, model, allocator).memory


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """The allocator as loading leaves it; address and elements of each parameter that is not quantised."""

    memory: WeightMemory
    allocator: CachingAllocator
    plain: tuple[tuple[int, int], ...]


_CACHE: dict[tuple[str, int, bool, int, bool, str], LoadedWeights] = {}


def upcast_bytes(setup: TrainingSetup, model: ModelSpec) -> int:
    """What PEFT's prepare_model_for_kbit_training adds: every parameter that is not quantised becomes fp32.

    Source: peft/utils/other.py, prepare_model_for_kbit_training.
    """
    if not setup.prepare_for_kbit_training:
        return 0
    more = FP32 - DTYPE_BYTES[setup.dtype]
    return more * sum(p.elements * p.count for p in model.parameters if not p.tied and not is_quantized(p))


def loaded_weights(setup: TrainingSetup, model: ModelSpec, allocator: str) -> LoadedWeights:
    """Loading a setup's base model, replayed once; the caller copies the allocator to go on with it."""
    quantized, width = setup.method == "qlora", DTYPE_BYTES[setup.dtype]
    double_quant = setup.bnb_4bit_use_double_quant
    # Keyed by name and size: hashing a whole spec costs more than the estimate it serves.
    key = (model.id, model.parameter_count, quantized, width, double_quant, allocator)
    known = _CACHE.get(key)
    if known is None:
        known = _CACHE[key] = _replay_load(model, quantized, width, double_quant, allocator)
    return known


def _replay_load(
    model: ModelSpec, quantized: bool, width: int, double_quant: bool, name: str
) -> LoadedWeights:
    allocator = empty_allocator(name)
    blocks = []
    packed = constants = plain = largest = 0
    for parameter in _in_module_order(model):
        size = parameter.elements * width
        largest = max(largest, size)
        if quantized and is_quantized(parameter):
            temporary = allocator.allocate(size)
            packed_bytes, constant_bytes = _quantize(allocator, parameter.elements, double_quant)
            allocator.free(temporary)
            packed += packed_bytes
            constants += constant_bytes
        else:
            blocks.append((allocator.allocate(size), parameter.elements))
            plain += size
    memory = WeightMemory(
        quantized_bytes=packed,
        constants_bytes=constants,
        unquantized_bytes=plain,
        allocated_bytes=allocator.allocated_bytes,
        largest_bytes=largest,
    )
    return LoadedWeights(memory, allocator, tuple(blocks))


def _quantize(allocator: CachingAllocator, elements: int, double_quant: bool) -> tuple[int, int]:
    """Replay bitsandbytes' quantize_4bit of one weight; returns packed and constant bytes."""
    packed_bytes, blocks = (elements + 1) // 2, -(-elements // BLOCK)
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
