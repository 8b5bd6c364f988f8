"""Shards: what of every tensor one GPU holds under FSDP2, and what it gathers of the others at once.

The units are the launcher's (docs/several-gpus.md): each decoder layer with its adapters and quantisation
constants. A frozen output head is whole on every GPU and a frozen embedding in the host's memory; tied, both
are one tensor on every GPU. Where all weights are trained the embedding is a unit, norm and head another.
Sources: torch distributed/fsdp/_fully_shard (_fsdp_param.py, _fsdp_collectives.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod

from planner.base.values import dataclass
from planner.memory.allocators.native import rounded
from planner.models.parameter import Parameter
from planner.models.spec import ModelSpec
from planner.models.storage import ABSMAX_WIDTH, QUANTIZATION_BLOCK, Storage
from planner.setup.parallelism import Parallelism
from planner.setup.run import TrainingRun
from planner.setup.trained import Trained, TrainedTensor


@dataclass(frozen=True, slots=True)
class Unit:
    """What FSDP2 gathers at once: bytes of each parameter once gathered, of each trained one's whole
    gradient, and of this GPU's share of these gradients, as it comes and as it is kept.
    """

    parameters: tuple[int, ...]
    gradients: tuple[int, ...]
    received_bytes: int
    reduced_bytes: int

    @property
    def flat_bytes(self) -> int:
        """The buffer that all of it arrives in."""
        return sum(self.parameters)

    @property
    def gathered_bytes(self) -> int:
        """The parameters that are computed with, each a block of its own."""
        return sum(map(rounded, self.parameters))

    @property
    def gradient_bytes(self) -> int:
        """Whole gradients, in one buffer as they are sent."""
        return sum(self.gradients)


NO_UNIT = Unit((), (), 0, 0)


@dataclass(frozen=True, slots=True)
class Units:
    """A run's units: the decoder layers in order and, where they are trained, the embedding, and the output
    head with what else there is (tied: the embedding too, which is NO_UNIT itself then).
    `gathered_head_bytes` is a head that the loss gathers by itself.
    """

    layers: tuple[Unit, ...]
    embedding: Unit
    head: Unit
    gathered_head_bytes: int

    @property
    def flat_bytes(self) -> int:
        """All layers' buffers together: what a pass over them receives, its own share included."""
        return sum(unit.flat_bytes for unit in self.layers)

    @property
    def gradient_bytes(self) -> int:
        """Whole gradients of everything trained."""
        return sum(unit.gradient_bytes for unit in (*self.layers, self.embedding, self.head))

    @property
    def reduced_bytes(self) -> int:
        """This GPU's share of them."""
        return sum(unit.reduced_bytes for unit in (*self.layers, self.embedding, self.head))


@lru_cache(maxsize=4096)
def held_trained(trained: Trained, parallelism: Parallelism) -> Trained:
    """A GPU's share of what is trained."""
    if not parallelism.shards:
        return trained
    return replace(trained, tensors=tuple(_share(tensor, parallelism) for tensor in trained.tensors))


def _share(tensor: TrainedTensor, parallelism: Parallelism) -> TrainedTensor:
    shape = parallelism.share(tensor.shape)
    return replace(tensor, shape=shape, elements=prod(shape))


@dataclass(frozen=True, slots=True)
class Share:
    """A GPU's part of a base parameter: bytes of its share of the tensor (packed, where it is in 4 bits) and
    of its share of the constants; both whole where `whole` says that every GPU holds all of it.
    """

    tensor_bytes: int
    constants_bytes: int
    whole: bool
    on_host: bool = False


def share_of(
    parameter: Parameter, storage: Storage, parallelism: Parallelism, *, trained: bool, tied: bool
) -> Share:
    """A GPU's part of a base parameter, which is `trained` or frozen, in a model with `tied` embeddings.

    Packed weights and constants are columns of elements of the compute dtype (bnb_4bit_quant_storage).
    """
    sharding = parallelism.sharding
    if not parameter.in_decoder_layer and not trained and not sharding.ends and _is_end(parameter):
        # Tied, the embedding stands for both.
        return Share(parameter.elements * storage.width, 0, True, not (parameter.is_output_head or tied))
    if not storage.quantizes(parameter):
        return Share(prod(parallelism.share(parameter.shape)) * storage.width, 0, False)
    packed = -(-((parameter.elements + 1) // 2) // storage.width)
    constants = absmax_bytes(parameter.elements, storage)
    shared = sharding.constants and constants % storage.width == 0
    return Share(
        parallelism.share((packed,))[0] * storage.width,
        parallelism.share((constants // storage.width,))[0] * storage.width if shared else 0,
        False,
    )


def absmax_bytes(elements: int, storage: Storage) -> int:
    """Bytes of the constants that are shared out with a 4-bit weight: one a block."""
    blocks = -(-elements // QUANTIZATION_BLOCK)
    return blocks if storage.double_quant else blocks * ABSMAX_WIDTH


def _is_end(parameter: Parameter) -> bool:
    return parameter.is_output_head or "Embedding" in parameter.module_class


def units_of(run: TrainingRun) -> Units:
    """What a run gathers together."""
    return _units(run.model, run.storage, run.trained, run.parallelism, run.adapter is None, run.reduce_width)


@lru_cache(maxsize=512)
def _units(
    model: ModelSpec,
    storage: Storage,
    trained: Trained,
    parallelism: Parallelism,
    trains_all: bool,
    reduce_width: int,
) -> Units:
    listed = [parameter for parameter in model.parameters if not parameter.tied]

    def unit(parameters: list[Parameter], tensors: list[TrainedTensor]) -> Unit:
        shares = [
            share_of(one, storage, parallelism, trained=trains_all, tied=model.tied_embeddings)
            for one in parameters
        ]
        gathered = [size for one in shares for size in (one.tensor_bytes, one.constants_bytes) if size]
        elements = [_share(tensor, parallelism).elements for tensor in tensors]
        if not trains_all:
            gathered += [count * storage.width for count in elements]
        widths = [tensor.element_width for tensor in tensors]
        return Unit(
            parameters=tuple(map(parallelism.gathered, gathered)),
            gradients=tuple(parallelism.gathered(count) * reduce_width for count in elements),
            received_bytes=sum(elements) * reduce_width,
            reduced_bytes=sum(count * width for count, width in zip(elements, widths, strict=True)),
        )

    tensors = {tensor.name: tensor for tensor in trained.tensors}
    known: dict[tuple[bool, ...], Unit] = {}
    layers = []
    for index in range(model.num_hidden_layers):
        # Layers of one kind have the same tensors.
        key = tuple(index < p.count for p in listed if p.in_decoder_layer)
        if key not in known:
            own = [p for p in listed if p.in_decoder_layer and index < p.count]
            known[key] = unit(own, [t for t in trained.tensors if t.in_decoder_layer and index < t.count])
        layers.append(known[key])
    ends = parallelism.sharding.ends
    if not trains_all and not ends:
        return Units(layers=tuple(layers), embedding=NO_UNIT, head=NO_UNIT, gathered_head_bytes=0)
    outside = [parameter for parameter in listed if not parameter.in_decoder_layer]
    first = [one for one in outside if "Embedding" in one.module_class]
    last = [one for one in outside if one not in first]
    if model.tied_embeddings:
        first, last = [], first + last
    embedding, head = (
        unit(some, [tensors[one.name] for one in some if one.name in tensors]) if some else NO_UNIT
        for some in (first, last)
    )
    by_loss = not trains_all and not model.tied_embeddings
    return Units(
        layers=tuple(layers),
        embedding=embedding,
        head=NO_UNIT if by_loss else head,
        gathered_head_bytes=head.flat_bytes if by_loss else 0,
    )
