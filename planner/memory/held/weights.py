"""Weights: what the loaded model holds, by kind, and what torch's allocator counts for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby

from planner.base.units import FP32
from planner.base.values import dataclass
from planner.memory.allocators.expandable import empty_allocator
from planner.memory.allocators.native import CachingAllocator, block_units
from planner.memory.allocators.passes import Pass
from planner.memory.tape.events import free
from planner.models.parameter import Parameter
from planner.models.spec import ModelSpec
from planner.models.storage import NESTED_BLOCK, QUANTIZATION_BLOCK, Storage
from planner.models.tower import Tower
from planner.setup.run import RunKind

CODE_BYTES = 16 * 4
NESTED_CODE_BYTES = 256 * 4
OFFSET_BYTES = 4
SCALE_WIDTH = 4
"""Bytes of the constant of an output, with weights in 8 bits (fp32)."""
TOLD_BYTES = 256
"""Block size, types and shape of a stored weight, as JSON in a tensor: half a block of the allocator's."""


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


def upcast_bytes(run: RunKind) -> int:
    """What PEFT's prepare_model_for_kbit_training adds: every parameter that is not quantised becomes fp32.

    Source: peft/utils/other.py, prepare_model_for_kbit_training.
    """
    if not run.setup.prepare_for_kbit_training:
        return 0
    storage = run.storage
    kept = (p for p in run.model.parameters if not p.tied and not storage.quantizes(p))
    return (FP32 - storage.width) * sum(p.elements * p.count for p in kept)


@lru_cache(maxsize=512)
def scales_bytes(run: RunKind) -> tuple[int, ...]:
    """Bytes of the float32 scales of each weight whose products are in 8 bits, one a row, layer by layer."""
    if run.setup.base_matmul == "bf16":
        return ()
    linears = [
        (FP32 * part.shape[0], part.count)
        for part in run.model.parameters
        if part.in_decoder_layer and part.kind == "weight" and part.module_class == "Linear"
    ]
    layers = range(max((count for _, count in linears), default=0))
    return tuple(size for layer in layers for size, count in linears if layer < count)


@lru_cache(maxsize=512)
def largest_quantized_bytes(model: ModelSpec, storage: Storage) -> int:
    """The largest weight that is quantised, whole again; 0 where none is."""
    sizes = [p.elements * storage.width for p in model.parameters if storage.quantizes(p)]
    if model.tower is not None:
        sizes += [p.elements * storage.width for p in model.tower.parameters if storage.quantizes_in_tower(p)]
    return max(sizes, default=0)


@lru_cache(maxsize=512)
def loaded_weights(model: ModelSpec, storage: Storage, allocator: str) -> LoadedWeights:
    """Loading a base model, replayed with one of torch's allocators; the caller copies it to go on."""
    state = empty_allocator(allocator)
    blocks: list[tuple[int, int]] = []
    packed = constants = plain = largest = 0
    for part, count, quantizes in _all_parts(model, storage):
        loading = _Loading(part, storage, quantizes)
        one = Pass(loading.events, loading.units)
        for _ in range(count):
            slots = [0] * len(loading.units)
            state.play(one, slots)
            blocks += [(slots[block], elements) for block, elements in loading.plain]
        packed += count * loading.packed_bytes
        constants += count * loading.constants_bytes
        plain += count * sum(elements for _, elements in loading.plain) * storage.width
        wide = (p for p in part if storage.stored is None or not quantizes(p))
        largest = max(largest, *(parameter.elements * storage.width for parameter in wide), 0)
    if storage.recast:
        # One after the other (launcher/training/loading/stored.py).
        addresses = state.replace_all(
            [address for address, _ in blocks], [elements * storage.width for _, elements in blocks]
        )
        blocks = [(address, elements) for address, (_, elements) in zip(addresses, blocks, strict=True)]
    memory = WeightMemory(
        quantized_bytes=packed,
        constants_bytes=constants,
        unquantized_bytes=plain,
        allocated_bytes=state.allocated_bytes,
        largest_bytes=largest,
    )
    return LoadedWeights(memory, state.copy(), tuple(blocks))


Quantizes = Callable[[Parameter], bool]


class _Loading:
    """What loading a few parameters one after the other asks for, and what stays: packed weights and their
    constants, and of each parameter that is not quantised the block and the elements.
    """

    def __init__(self, parameters: Sequence[Parameter], storage: Storage, quantizes: Quantizes) -> None:
        self.events: list[int] = []
        self.units: list[int] = []
        self.plain: list[tuple[int, int]] = []
        self.packed_bytes = self.constants_bytes = 0
        for parameter in parameters:
            if storage.stored is not None and quantizes(parameter):
                if storage.bits == 8:
                    self._read_eight(parameter)
                else:
                    self._read(parameter.elements, storage.double_quant)
                continue
            whole = self._take(parameter.elements * (storage.stored or storage.width))
            if quantizes(parameter):
                if storage.bits == 8:
                    self._quantize_eight(parameter)
                else:
                    self._quantize(parameter.elements, storage.double_quant)
                self.events.append(free(whole))
            else:
                self.plain.append((whole, parameter.elements))

    def _take(self, size_bytes: int) -> int:
        block = len(self.units)
        self.units.append(block_units(size_bytes))
        self.events.append(block)
        return block

    def _quantize(self, elements: int, double_quant: bool) -> None:
        """bitsandbytes' quantize_4bit of one weight."""
        packed_bytes, blocks = (elements + 1) // 2, -(-elements // QUANTIZATION_BLOCK)
        absmax = self._take(blocks * 4)
        self._take(packed_bytes)
        self._take(CODE_BYTES)
        self.packed_bytes += packed_bytes
        if not double_quant:
            self.constants_bytes += blocks * 4 + CODE_BYTES
            return
        self._take(OFFSET_BYTES)
        shifted = self._take(blocks * 4)
        self._take(NESTED_CODE_BYTES)
        nested = -(-blocks // NESTED_BLOCK) * 4
        self._take(nested)
        self._take(blocks)
        self.events += [free(shifted), free(absmax)]
        self.constants_bytes += blocks + nested + CODE_BYTES + OFFSET_BYTES + NESTED_CODE_BYTES

    def _quantize_eight(self, parameter: Parameter) -> None:
        """bitsandbytes' int8_vectorwise_quant of a weight, by a float16 copy (nn/modules.py, Int8Params)."""
        copy = self._take(parameter.elements * 2)
        self._hold_eight(parameter)
        self.events.append(free(copy))

    def _read_eight(self, parameter: Parameter) -> None:
        """A weight that is stored in 8 bits; its layout, a byte, is read and goes."""
        layout = self._take(1)
        self._hold_eight(parameter)
        self.events.append(free(layout))

    def _hold_eight(self, parameter: Parameter) -> None:
        constants = parameter.shape[0] * SCALE_WIDTH
        self._take(constants)
        self._take(parameter.elements)
        self.packed_bytes += parameter.elements
        self.constants_bytes += constants

    def _read(self, elements: int, double_quant: bool) -> None:
        """A weight that is stored in 4 bits, with its constants, each a tensor of the file (transformers
        integrations/bitsandbytes.py, Bnb4bitDeserialize).
        """
        packed_bytes, blocks = (elements + 1) // 2, -(-elements // QUANTIZATION_BLOCK)
        self._take(packed_bytes)
        self._take(blocks * (1 if double_quant else 4))
        constants = blocks * (1 if double_quant else 4) + CODE_BYTES
        if double_quant:
            nested = -(-blocks // NESTED_BLOCK) * 4
            self._take(nested)
            self._take(NESTED_CODE_BYTES)
            constants += nested + OFFSET_BYTES + NESTED_CODE_BYTES
        self._take(CODE_BYTES)
        # What is no tensor is read from bytes on the GPU, which go then.
        told = self._take(TOLD_BYTES)
        if double_quant:
            self._take(OFFSET_BYTES)
        self.events.append(free(told))
        self.packed_bytes += packed_bytes
        self.constants_bytes += constants


def _all_parts(model: ModelSpec, storage: Storage) -> Iterator[tuple[Sequence[Parameter], int, Quantizes]]:
    """Parameters as the model's modules come, a vision tower's before the language model's."""
    if model.tower is not None:
        for part, count in _in_tower_order(model.tower):
            yield part, count, storage.quantizes_in_tower
    for part, count in _in_module_order(model):
        yield part, count, storage.quantizes


def _in_tower_order(tower: Tower) -> Iterator[tuple[Sequence[Parameter], int]]:
    """A tower's parameters before, inside and after its layers, with how often they come."""
    for inside, part in groupby(tower.parameters, key=lambda one: one.in_decoder_layer):
        yield tuple(part), tower.depth if inside else 1


def _in_module_order(model: ModelSpec) -> Iterator[tuple[Sequence[Parameter], int]]:
    """Parameters as the model's modules come, before, inside and after the layers, and how many times they
    come one after the other: layers in a row have the same.
    """
    listed = [parameter for parameter in model.parameters if not parameter.tied]
    inside = [index for index, parameter in enumerate(listed) if parameter.in_decoder_layer]
    first = inside[0] if inside else len(listed)
    if listed[:first]:
        yield listed[:first], 1
    alike = (
        tuple(listed[index] for index in inside if layer < listed[index].count)
        for layer in range(model.num_hidden_layers)
    )
    for part, layers in groupby(alike):
        if part:
            yield part, len(list(layers))
    last = [parameter for parameter in listed[first:] if not parameter.in_decoder_layer]
    if last:
        yield last, 1
