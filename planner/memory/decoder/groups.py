"""Groups: the decoder layers of one kind that a setup treats alike, and what they do to memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import lru_cache

from planner.base.lazy import cached_fact
from planner.base.units import FP32
from planner.base.values import dataclass
from planner.memory.decoder.live_bytes import (
    LayerMemory,
    final_norm_memory,
    final_norm_saves_input,
    layer_memory,
    output_width,
)
from planner.memory.layers.base_weight import LinearKind
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.models.spec import LayerSpec, ModelSpec
from planner.models.storage import EXACT_ENDS, Storage
from planner.setup.adapters import Adapter
from planner.setup.run import RunKind, TrainingRun
from planner.setup.trained import trained_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Layers at `indices` (ascending), alike in kind and checkpointing.

    A compiled layer is not `checkpointed` here: its graphs keep the input and recompute (`knobs.recomputes`).

    `selected_bytes_per_token` is what selective checkpointing keeps of each beside its input. `layer`,
    `knobs` and `input_requires_grad` are what their memory was counted from.
    """

    indices: tuple[int, ...]
    checkpointed: bool
    input_bytes_per_token: int
    selected_bytes_per_token: int
    memory: LayerMemory
    layer: LayerSpec
    knobs: LayerKnobs
    input_requires_grad: bool


@dataclass(frozen=True, kw_only=True)
class DecoderSetup:
    """All that a run says of its decoder layers: two runs that agree in it have the same groups.

    `stream_width` is the bytes of an element of what enters the first layer, `trained_width` that of what is
    trained. `attention_kernels` are those of each kind of layer, `checkpointed_layers` how many, from the
    first one on, keep their input alone. `graph_tokens` are a micro-step's, where a `budget` divides the
    graph of so many (else 0). `accumulating` says that gradients of earlier micro-steps are there: an
    adapter's are so small that those of one layer may be counted as new beside them, a trained weight's
    are not.
    """

    storage: Storage
    adapter: Adapter | None
    dropout: bool
    stream_width: int
    trained_width: int
    liger: bool
    selective: bool
    compiled: bool
    budget: float | None
    graph_tokens: int
    attention_kernels: tuple[str, ...]
    checkpointed_layers: int
    accumulating: bool
    base_matmul: str

    def __hash__(self) -> int:
        return self._digest

    @cached_fact
    def _digest(self) -> int:
        """Of all fields, made once: a decoder's setup is the key of what is remembered of its layers."""
        return hash(tuple(getattr(self, one.name) for one in fields(self)))

    def expert_kind(self, rank: int) -> LinearKind:
        """A stack of experts with an adapter of that rank (0: without one)."""
        quantized = self.storage.quantized and self.storage.experts
        sliced = quantized and self.storage.slices_experts
        return replace(self.linear_kind(rank), quantized=quantized, sliced=sliced)

    def linear_kind(self, rank: int) -> LinearKind:
        """A linear layer with an adapter of that rank (0: without one)."""
        return LinearKind(
            quantized=self.storage.quantized,
            trained=self.adapter is None,
            rank=rank,
            dropout=self.dropout,
            dora=rank > 0 and self.adapter is not None and self.adapter.variant.magnitudes,
            double_quant=self.storage.double_quant,
            compute_width=self.storage.width,
            weight_width=self.storage.width,
            adapter_width=self.trained_width,
            autocast=self.storage.width != FP32,
            accumulating=self.accumulating,
            eight_bit_forward=self.base_matmul == "fp8",
            eight_bit_backward=self.base_matmul != "bf16",
            bits=self.storage.bits,
            peft_type="lora" if self.adapter is None else self.adapter.variant.peft_type,
            frozen_down=rank > 0 and self.adapter is not None and self.adapter.variant.frozen_down,
        )


_known: dict[DecoderSetup, DecoderSetup] = {}
"""Equal ones are one object, which is found without a look at its fields."""


def decoder_setup(run: TrainingRun) -> DecoderSetup:
    """What a run says of its decoder layers."""
    setup = run.setup
    graph_tokens = 0 if setup.activation_memory_budget is None else run.micro_step.tokens
    accumulating = run.adapter is None and setup.gradient_accumulation_steps > 1
    return _decoder_setup(
        run.kind, run.attention_kernels, run.micro_step.stream_width, graph_tokens, accumulating
    )


@lru_cache(maxsize=8192)
def _decoder_setup(
    kind: RunKind, kernels: tuple[str, ...], stream_width: int, graph_tokens: int, accumulating: bool
) -> DecoderSetup:
    setup = kind.setup
    found = DecoderSetup(
        storage=kind.storage,
        adapter=kind.adapter,
        dropout=setup.lora_dropout > 0 and setup.objective.drops_out,
        stream_width=stream_width,
        trained_width=_trained_width(kind),
        liger=setup.kernels == "liger",
        selective=kind.keeps_attention,
        compiled=setup.compile == "regional",
        budget=setup.activation_memory_budget,
        graph_tokens=graph_tokens,
        attention_kernels=kernels,
        checkpointed_layers=kind.checkpointed_layers,
        accumulating=accumulating,
        base_matmul=setup.base_matmul,
    )
    return _known.setdefault(found, found)


def _trained_width(run: RunKind) -> int:
    """Bytes of an element of what is trained as layers see it: FSDP2 gathers it in the compute dtype."""
    if run.adapter is None or run.parallelism.shards:
        return run.storage.width
    return run.adapter.width


def layer_groups(run: TrainingRun) -> tuple[tuple[LayerGroup, ...], LayerMemory]:
    """Groups of a run's layers, and the memory of the final norm."""
    return groups_of(run.model, decoder_setup(run))


@lru_cache(maxsize=8192)
def groups_of(model: ModelSpec, decoder: DecoderSetup) -> tuple[tuple[LayerGroup, ...], LayerMemory]:
    """Groups of a model's layers, and the memory of the final norm."""
    trained = trained_tensors(model, decoder.adapter, decoder.storage.width)
    ranks = (*trained.ranks, ("router", trained.router_rank))
    kinds = tuple((name, decoder.linear_kind(rank)) for name, rank in ranks)
    if decoder.adapter is None:
        biased = replace(decoder.linear_kind(0), biased=True)
        kinds = (*((name, biased) for name in model.biased_linears), *kinds)
    common = LayerKnobs(
        kinds=(*kinds, ("experts", decoder.expert_kind(trained.experts_rank))),
        default=decoder.linear_kind(0),
        attention="fused",
        stream_width=decoder.stream_width,
        norm_width=decoder.stream_width,
        liger=decoder.liger,
        selective=decoder.selective,
        compiled=decoder.compiled,
        budget=decoder.budget,
        graph_tokens=decoder.graph_tokens,
    )
    found = []
    first = later = decoder.stream_width
    for layer, kernel in zip(model.layers, decoder.attention_kernels, strict=True):
        knobs = replace(common, attention=kernel).keeping(layer.kept)
        later = output_width(layer, knobs)
        for width, indices in ((first, layer.indices[:1]), (later, layer.indices[1:])):
            # What enters the very first layer alone is the embeddings' own output.
            if layer.indices[0] != 0 or first == later:
                width, indices = later, layer.indices
            own = replace(knobs, stream_width=width)
            for changed, some in _exact_apart(own, indices, model.num_hidden_layers):
                found += _groups_of_kind(decoder, layer, changed, some, trained.reaches_embedding)
            if indices is layer.indices:
                break
    return tuple(found), final_norm_memory(model.norm_layer, replace(common, stream_width=later))


def leaving_width(run: TrainingRun) -> int:
    """Bytes of an element of the hidden states that leave the last layer, which the final norm does not save:
    0 where it saves them, and they count with it.
    """
    return _leaving_width(run.model, decoder_setup(run))


@lru_cache(maxsize=8192)
def _leaving_width(model: ModelSpec, decoder: DecoderSetup) -> int:
    last = max(groups_of(model, decoder)[0], key=lambda group: group.indices[-1])
    width = last.memory.output_width
    saved = final_norm_saves_input(model.norm_layer, replace(last.knobs, stream_width=width))
    return 0 if saved else width


def _exact_apart(
    knobs: LayerKnobs, indices: tuple[int, ...], layers: int
) -> Iterator[tuple[LayerKnobs, tuple[int, ...]]]:
    """Layers at the ends, whose forward pass is in 16 bits whatever that of the others, and the others."""
    if not knobs.default.eight_bit_forward:
        yield knobs, indices
        return
    inner = tuple(index for index in indices if EXACT_ENDS <= index < layers - EXACT_ENDS)
    if inner:
        yield knobs, inner
    outer = tuple(index for index in indices if index not in inner)
    if outer:
        yield knobs.exact_forward(), outer


def _selected(layer: LayerSpec, knobs: LayerKnobs) -> int:
    """Attention's output and log-sum-exp (trl/models/selective_activation_checkpointing.py): kept by the
    policy where a fused kernel of torch's sdpa computes them.
    """
    if not knobs.selective or knobs.attention not in ("fused", "masked"):
        return 0
    return layer.query_size * knobs.default.compute_width + layer.num_attention_heads * FP32


def _groups_of_kind(
    decoder: DecoderSetup,
    layer: LayerSpec,
    knobs: LayerKnobs,
    layers: tuple[int, ...],
    reaches_embedding: bool,
) -> list[LayerGroup]:
    """Groups of layers of one kind that get a stream of one width."""
    # Nothing asks for the embeddings' gradient in a LoRA run without checkpoints.
    limit, leaf = decoder.checkpointed_layers, not reaches_embedding
    groups = {
        (True, True): [i for i in layers if i < limit],
        (False, False): [i for i in layers if i >= limit and i == 0 and leaf],
        (False, True): [i for i in layers if i >= limit and not (i == 0 and leaf)],
    }
    found = []
    for (checkpointed, input_grad), indices in groups.items():
        if not indices:
            continue
        own = knobs
        if knobs.compiled:
            # A compiled layer contains its checkpoint: input and recomputation are its graphs'.
            own, checkpointed = replace(knobs, recomputes=checkpointed), False
        found.append(
            LayerGroup(
                indices=tuple(sorted(indices)),
                checkpointed=checkpointed,
                input_bytes_per_token=layer.hidden_size * knobs.stream_width,
                selected_bytes_per_token=_selected(layer, knobs) if checkpointed else 0,
                memory=layer_memory(layer, own, checkpointed=checkpointed, input_requires_grad=input_grad),
                layer=layer,
                knobs=own,
                input_requires_grad=input_grad,
            )
        )
    return found
