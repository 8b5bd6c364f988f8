"""What a run trains: the adapter's tensors and which modules carry them, or every parameter of the base."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from planner.base.errors import FieldError, InputError
from planner.base.lazy import cached_fact
from planner.base.units import FP32
from planner.base.values import dataclass
from planner.models.parameter import Parameter
from planner.models.scored import is_scored
from planner.models.spec import ModelSpec
from planner.models.storage import adapts_experts, is_expert_stack
from planner.setup.adapters import Adapter
from planner.setup.training_setup import ALL_LINEAR

INT64 = 8
FUSED_EXPERT_NAMES = ("gate_proj", "up_proj")
"""What PEFT maps onto a fused expert tensor, doubling its rank (utils/transformers_weight_conversion.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTensor:
    """Trainable tensors of one shape: elements of each and their width, how many, whether an embedding owns
    them, and whether they have that width from the start, where an adapter's are cast to it.
    """

    name: str
    elements: int
    element_width: int
    count: int
    shape: tuple[int, ...]
    in_decoder_layer: bool
    is_embedding: bool = False
    uncast: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of one tensor."""
        return self.elements * self.element_width


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a setup trains; its sums are made once, since thousands of setups train the same.

    `ranks` gives the adapter rank by module name (absent: no adapter), `experts_rank` and `router_rank` that
    of experts' and routers' tensors, `element_width` the width of trained weights, of their gradients and of
    torch optimizer state. `embedding` and `head` say whether those are trained whole, `token_rows` how many
    rows of an embedding are by themselves. `frozen` are tensors of the adapter that stay as they began.
    """

    tensors: tuple[TrainedTensor, ...]
    ranks: tuple[tuple[str, int], ...]
    experts_rank: int
    router_rank: int
    element_width: int
    embedding: bool = False
    head: bool = False
    token_rows: int = 0
    frozen: tuple[TrainedTensor, ...] = ()

    @cached_fact
    def held(self) -> tuple[TrainedTensor, ...]:
        """Trained tensors and the adapter's frozen ones, which come before them in each module."""
        if not self.frozen:
            return self.tensors
        names = [tensor.name.partition(".lora_")[0] for tensor in self.tensors]
        of_module: dict[str, list[TrainedTensor]] = {"": [], **{name: [] for name in names}}
        for tensor in (*self.frozen, *self.tensors):
            name = tensor.name.partition(".lora_")[0]
            of_module[name if name in of_module else ""].append(tensor)
        return tuple(tensor for tensors in of_module.values() for tensor in tensors)

    @cached_fact
    def reaches_embedding(self) -> bool:
        """Whether backward goes on from the first layer to the embedding."""
        return self.embedding or self.token_rows > 0

    @cached_fact
    def elements(self) -> int:
        """All trainable parameters."""
        return sum(t.elements * t.count for t in self.tensors)

    @cached_fact
    def tensor_count(self) -> int:
        """How many tensors hold them: what an optimizer that updates one at a time runs for."""
        return sum(t.count for t in self.tensors)

    @cached_fact
    def size_bytes(self) -> int:
        """Bytes of all of them, and of their gradients."""
        return sum(t.size_bytes * t.count for t in self.tensors)


@lru_cache(maxsize=4096)
def trained_tensors(model: ModelSpec, adapter: Adapter | None, width: int) -> Trained:
    """What is trained: the adapter's tensors, or every parameter of the model at `width` bytes an element.

    Raises:
        FieldError: target_modules names a module that the model does not have.
    """
    return _full(model, width) if adapter is None else _adapter(model, adapter, width)


def _full(model: ModelSpec, width: int) -> Trained:
    tensors = tuple(_whole(p, width) for p in model.parameters if not p.tied)
    return Trained(
        tensors=tensors,
        ranks=(),
        experts_rank=0,
        router_rank=0,
        element_width=width,
        embedding=True,
        head=True,
    )


def _whole(p: Parameter, width: int) -> TrainedTensor:
    """A parameter that is trained itself."""
    return TrainedTensor(
        name=p.name,
        elements=p.elements,
        element_width=width,
        count=p.count,
        shape=p.shape,
        in_decoder_layer=p.in_decoder_layer,
        is_embedding=p.is_embedding,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """Parameters that get an adapter: linear layers' weights, stacked experts, and routers' weights."""

    linears: tuple[Parameter, ...]
    experts: tuple[Parameter, ...]
    routers: tuple[Parameter, ...]


def adapted(model: ModelSpec, target_modules: str | tuple[str, ...]) -> Adapted:
    """What PEFT puts an adapter on. Routers get one with all-linear alone, and so do linear layers that are
    named as experts' matrices are (shared experts, dense layers) only where it does not adapt experts: it
    takes those names for the experts' then (utils/transformers_weight_conversion.py).

    Raises:
        FieldError: target_modules names a module that the model does not have.
        InputError: it names some of the experts' matrices, which are adapted together.
    """
    linears = [
        p
        for p in model.parameters
        if p.module_class == "Linear" and p.kind == "weight" and not p.is_output_head
    ]
    experts = [p for p in model.parameters if is_expert_stack(p)]
    if not adapts_experts(model.model_type):
        experts = []
    if experts:
        linears = [p for p in linears if p.module_name not in (*FUSED_EXPERT_NAMES, "down_proj")]
    routers = [p for p in model.parameters if p.module_class.endswith("Router") and p.kind == "weight"]
    if target_modules == ALL_LINEAR:
        return Adapted(
            linears=tuple(linears), experts=tuple(experts), routers=tuple(routers) if experts else ()
        )
    chosen = [p for p in linears if any(_matches(p, target) for target in target_modules)]
    with_experts = _targets_experts(target_modules, experts)
    _refuse_unknown(target_modules, linears, experts)
    return Adapted(linears=tuple(chosen), experts=tuple(experts) if with_experts else (), routers=())


def expert_rank(name: str, rank: int) -> int:
    """Rank of one expert's adapter on the tensor of that name: PEFT doubles that of the fused one."""
    return 2 * rank if name == "gate_up_proj" else rank


def saved_whole(model: ModelSpec, names: tuple[str, ...]) -> tuple[Parameter, ...]:
    """The embedding and the head, as far as `names` (modules_to_save) has them: where they are one tensor,
    either name stands for both (the launcher asks PEFT to keep them one).

    Raises:
        FieldError: another module, or one that the model does not have.
    """
    found = {p.module_name: p for p in model.parameters if p.is_embedding or p.is_output_head}
    for name in names:
        if name not in found:
            accepted = f"{', '.join(found)}: other modules of this model are not trained whole"
            raise FieldError("modules_to_save", name, accepted)
    if model.tied_embeddings and names:
        return tuple(p for p in found.values() if not p.tied)
    return tuple(p for name, p in found.items() if name in names)


def trained_biases(model: ModelSpec, bias: str, linears: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """The biases that PEFT trains: of `linears`, which carry the adapter, or all that the model has.

    Raises:
        FieldError: it has none.
    """
    if bias == "none":
        return ()
    carrying = {p.name.rpartition(".")[0] for p in linears}
    found = tuple(
        p
        for p in model.parameters
        if p.kind == "bias" and (bias == "all" or p.name.rpartition(".")[0] in carrying)
    )
    if not found:
        raise FieldError("bias", bias, f"none: {model.id} has no such biases")
    return found


def _beside(model: ModelSpec, adapter: Adapter, linears: tuple[Parameter, ...], width: int) -> Trained:
    """What is trained beside an adapter: modules as a copy of the base's, which stays, biases, and rows of
    the embedding, these two held in fp32, since steps would be rounded away in 16 bits.
    """
    saved = saved_whole(model, adapter.modules_to_save)
    biases = trained_biases(model, adapter.bias, linears)
    embedding = any(p.is_embedding for p in saved)
    if embedding and adapter.token_rows:
        raise InputError("trainable_token_indices: modules_to_save trains the whole embedding already")
    rows = [p for p in model.parameters if p.is_embedding] if adapter.token_rows else []
    tensors = [
        *(_like(p, p.shape, width, is_embedding=p.is_embedding) for p in saved),
        *(_like(p, p.shape, FP32) for p in biases),
        *(_like(p, (adapter.token_rows, p.shape[-1]), FP32) for p in rows),
    ]
    return Trained(
        tensors=tuple(tensors),
        ranks=(),
        experts_rank=0,
        router_rank=0,
        element_width=width,
        embedding=embedding,
        head=any(p.is_output_head for p in saved) or (embedding and model.tied_embeddings),
        token_rows=adapter.token_rows,
    )


def _like(p: Parameter, shape: tuple[int, ...], width: int, *, is_embedding: bool = False) -> TrainedTensor:
    return TrainedTensor(
        name=p.name,
        elements=math.prod(shape),
        element_width=width,
        count=p.count,
        shape=shape,
        in_decoder_layer=p.in_decoder_layer,
        is_embedding=is_embedding,
        uncast=True,
    )


def _adapter(model: ModelSpec, adapter: Adapter, base_width: int) -> Trained:
    found, rank, width = adapted(model, adapter.target_modules), adapter.rank, adapter.width
    tensors: list[TrainedTensor] = []
    of_type = adapter.variant.peft_type
    for p in found.linears:
        if of_type != "lora":
            tensors += _of_type(p, of_type, rank, width)
            continue
        tensors += _pair(p.name, p.shape, rank, p.count, 1, width)
        if adapter.variant.magnitudes:
            tensors.append(_magnitude(p))
    for p in found.experts:
        tensors += _pair(p.name, p.shape[1:], expert_rank(p.kind, rank), p.count, p.shape[0], width)
    for p in found.routers:
        tensors += _pair(p.name, p.shape, rank, p.count, 1, width)
    if is_scored(model):
        # PEFT trains the head of a sequence classification whole, beside a copy of it (peft_model.py,
        # PeftModelForSequenceClassification).
        tensors.append(_whole(model.parameters[-1], width))
    beside = _beside(model, adapter, found.linears, base_width)
    frozen = [t for t in tensors if adapter.variant.frozen_down and t.name.endswith(".lora_A")]
    if of_type == "vera":
        frozen = _shared(found.linears, rank)
    elif of_type == "oft":
        # Where the upper triangle's values belong in a block: rows and columns.
        frozen = [_like(p, (rank * (rank - 1) // 2,), INT64) for p in found.linears for _ in range(2)]
    return Trained(
        tensors=(*(t for t in tensors if t not in frozen), *beside.tensors),
        frozen=tuple(frozen),
        ranks=tuple((p.module_name, rank) for p in found.linears),
        experts_rank=rank if found.experts else 0,
        router_rank=rank if found.routers else 0,
        element_width=width,
        embedding=beside.embedding,
        head=beside.head,
        token_rows=beside.token_rows,
    )


def _pair(
    name: str, shape: tuple[int, ...], rank: int, count: int, experts: int, width: int
) -> tuple[TrainedTensor, TrainedTensor]:
    """lora_A of rank x inputs and lora_B of outputs x rank; experts are stacked along the rank."""
    outputs, inputs = shape
    inside = "*" in name
    return (
        TrainedTensor(
            name=f"{name}.lora_A",
            elements=rank * experts * inputs,
            element_width=width,
            count=count,
            shape=(rank * experts, inputs),
            in_decoder_layer=inside,
        ),
        TrainedTensor(
            name=f"{name}.lora_B",
            elements=outputs * rank * experts,
            element_width=width,
            count=count,
            shape=(outputs, rank * experts),
            in_decoder_layer=inside,
        ),
    )


def _of_type(p: Parameter, of_type: str, rank: int, width: int) -> tuple[TrainedTensor, ...]:
    """What another kind of adapter trains of a linear layer (PEFT tuners/vera, miss and oft, layer.py)."""
    outputs, inputs = p.shape
    if of_type == "vera":
        return (_like(p, (outputs,), FP32), _like(p, (rank,), FP32))
    if of_type == "miss":
        if rank > inputs:
            raise FieldError("lora_r", rank, f"at most {inputs} with peft_type miss: inputs of {p.name}")
        shape = (rank, outputs)
    else:
        if inputs % rank:
            raise FieldError("lora_r", rank, f"a divisor of {inputs} with peft_type oft: inputs of {p.name}")
        shape = (inputs // rank, rank * (rank - 1) // 2)
    return (replace(_like(p, shape, width), uncast=False),)


def _shared(linears: tuple[Parameter, ...], rank: int) -> list[TrainedTensor]:
    """VeRA's two frozen matrices, as large as the widest layer asks for."""
    outputs, inputs = (max(p.shape[place] for p in linears) for place in (0, 1))
    return [
        TrainedTensor(
            name=name,
            elements=math.prod(shape),
            element_width=FP32,
            count=1,
            shape=shape,
            in_decoder_layer=False,
            uncast=True,
        )
        for name, shape in (("vera_A", (rank, inputs)), ("vera_B", (outputs, rank)))
    ]


def _magnitude(parameter: Parameter) -> TrainedTensor:
    """DoRA's magnitude vector, a value an output: the one adapter tensor that TRL leaves in fp32."""
    return TrainedTensor(
        name=f"{parameter.name}.lora_magnitude_vector",
        elements=parameter.shape[0],
        element_width=FP32,
        count=parameter.count,
        shape=(parameter.shape[0],),
        in_decoder_layer="*" in parameter.name,
    )


def _matches(parameter: Parameter, target: str) -> bool:
    module = parameter.name.rsplit(".", 1)[0]
    return module == target or module.endswith("." + target)


def _targets_experts(targets: str | tuple[str, ...], experts: list[Parameter]) -> bool:
    if not experts:
        return False
    fused = [name for name in FUSED_EXPERT_NAMES if name in targets]
    if len(fused) == 1:
        missing = next(name for name in FUSED_EXPERT_NAMES if name not in targets)
        raise InputError(
            f"target_modules: {fused[0]} needs {missing} too, they are one tensor in this model's experts"
        )
    if bool(fused) != ("down_proj" in targets):
        raise InputError(
            "target_modules: name gate_proj, up_proj and down_proj together for this model's experts"
        )
    return bool(fused)


def _refuse_unknown(
    targets: str | tuple[str, ...], linears: list[Parameter], experts: list[Parameter]
) -> None:
    for target in targets:
        if experts and target in (*FUSED_EXPERT_NAMES, "down_proj"):
            continue
        if not any(_matches(p, target) for p in linears):
            names = sorted({p.module_name for p in linears})
            raise FieldError(
                "target_modules", target, f'"{ALL_LINEAR}" or modules of this model: {", ".join(names)}'
            )
