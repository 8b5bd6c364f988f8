"""Segments: the decoder layers of one kind that a setup treats alike, with their replays."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace

from planner.base.units import DTYPE_BYTES, FP32
from planner.memory.decoder.live_bytes import LayerReplay, final_norm_replay, layer_replay, output_bytes
from planner.memory.held.micro_step import stream_bytes
from planner.memory.held.trainables import Trainables
from planner.memory.layers.base_weight import LinearKind
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.models.spec import LayerSpec, ModelSpec
from planner.setup.attention import keeps_attention
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Layers at `indices` (ascending), alike in kind and checkpointing.

    A compiled layer is not `checkpointed` here: its graphs keep the input and recompute (`knobs.recomputes`).

    `selected_bytes_per_token` is what selective checkpointing keeps of each beside its input. `layer`,
    `knobs` and `input_requires_grad` are what their replay was made from.
    """

    indices: tuple[int, ...]
    checkpointed: bool
    input_bytes_per_token: int
    selected_bytes_per_token: int
    replay: LayerReplay
    layer: LayerSpec
    knobs: LayerKnobs
    input_requires_grad: bool

    def count_below(self, index: int) -> int:
        """How many of these layers lie below a position."""
        return bisect_left(self.indices, index)

    def count_above(self, index: int) -> int:
        """How many lie above a position."""
        return len(self.indices) - bisect_right(self.indices, index)


_SEGMENTS: dict[tuple[object, ...], tuple[tuple[Segment, ...], LayerReplay]] = {}


def segments(
    setup: TrainingSetup, model: ModelSpec, trained: Trainables, *, attention: str, padded: bool
) -> tuple[tuple[Segment, ...], LayerReplay]:
    """Segments of a setup, and the replay of the final norm."""
    kernels = tuple(_kernel(setup, layer, attention=attention, padded=padded) for layer in model.layers)
    checkpointed = _checkpointed_layers(setup, model)
    # An adapter's gradients are so small that those of one layer may be counted as new beside those that are
    # there already; a trained weight's are not.
    accumulating = setup.gradient_accumulation_steps > 1 and setup.method == "full"
    key = (
        model.id,
        model.parameter_count,
        setup.method,
        setup.dtype,
        setup.lora_r,
        setup.target_modules,
        setup.use_dora,
        setup.lora_dropout > 0,
        setup.bnb_4bit_use_double_quant,
        setup.prepare_for_kbit_training,
        setup.kernels,
        keeps_attention(setup, model),
        setup.compile,
        setup.activation_memory_budget,
        _graph_tokens(setup),
        kernels,
        checkpointed,
        accumulating,
    )
    known = _SEGMENTS.get(key)
    if known is None:
        default = _linear_kind(setup, 0, trained.element_bytes, accumulating=accumulating)
        kinds = tuple(
            (name, _linear_kind(setup, rank, trained.element_bytes, accumulating=accumulating))
            for name, rank in (
                *trained.ranks,
                ("experts", trained.experts_rank),
                ("router", trained.router_rank),
            )
        )
        known = _SEGMENTS[key] = _replay_all(setup, model, kinds, default, kernels)
    return known


def _checkpointed_layers(setup: TrainingSetup, model: ModelSpec) -> int:
    if not setup.gradient_checkpointing:
        return 0
    return model.num_hidden_layers if setup.checkpointed_layers is None else setup.checkpointed_layers


def _kernel(setup: TrainingSetup, layer: LayerSpec, *, attention: str, padded: bool) -> str:
    """Which of planner.memory.layers.attention.KERNELS runs in layers of that kind.

    sdpa gets a mask where a batch is padded or packed, or where a sliding window is shorter than the
    sequence. Without one torch repeats keys itself, in flash attention (16 bits) alone (sdpa_attention.py,
    use_gqa_in_sdpa).
    """
    if attention == "eager":
        several = setup.per_device_train_batch_size > 1 and not setup.packing
        return "batched_eager" if several else "eager"
    if attention == "flex_attention":
        return "flex"
    window = layer.sliding_window is not None and layer.sliding_window < setup.max_length
    if attention == "sdpa" and (padded or window or setup.packing):
        return "masked"
    shared = layer.num_attention_heads != layer.num_key_value_heads
    if attention == "sdpa" and setup.dtype == "float32" and shared:
        return "math"
    return "fused"


def _linear_kind(setup: TrainingSetup, rank: int, element_bytes: int, *, accumulating: bool) -> LinearKind:
    return LinearKind(
        quantized=setup.method == "qlora",
        trained=setup.method == "full",
        rank=rank,
        dropout=setup.lora_dropout > 0,
        dora=setup.use_dora and rank > 0,
        double_quant=setup.bnb_4bit_use_double_quant,
        compute_bytes=DTYPE_BYTES[setup.dtype],
        weight_bytes=DTYPE_BYTES[setup.dtype],
        adapter_bytes=element_bytes,
        autocast=setup.dtype != "float32",
        accumulating=accumulating,
    )


def _replay_all(
    setup: TrainingSetup,
    model: ModelSpec,
    kinds: tuple[tuple[str, LinearKind], ...],
    default: LinearKind,
    kernels: tuple[str, ...],
) -> tuple[tuple[Segment, ...], LayerReplay]:
    first = stream_bytes(setup)
    common = LayerKnobs(
        kinds=kinds,
        default=default,
        attention="fused",
        stream_bytes=first,
        norm_bytes=first,
        liger=setup.kernels == "liger",
        selective=keeps_attention(setup, model),
        compiled=setup.compile == "regional",
        budget=setup.activation_memory_budget,
        graph_tokens=_graph_tokens(setup),
    )
    found = []
    later = first
    for layer, kernel in zip(model.layers, kernels, strict=True):
        knobs = replace(common, attention=kernel)
        later = output_bytes(layer, knobs)
        for width, indices in ((first, layer.indices[:1]), (later, layer.indices[1:])):
            # What enters the very first layer alone is the embeddings' own output.
            if layer.indices[0] != 0 or first == later:
                width, indices = later, layer.indices
            found += _segments_of(setup, model, layer, replace(knobs, stream_bytes=width), indices)
            if indices is layer.indices:
                break
    last = model.layers[-1]
    return tuple(found), final_norm_replay(last, replace(common, stream_bytes=later))


def _graph_tokens(setup: TrainingSetup) -> int:
    return 0 if setup.activation_memory_budget is None else setup.tokens_per_micro_step


def _selected(layer: LayerSpec, knobs: LayerKnobs) -> int:
    """Attention's output and log-sum-exp (trl/models/selective_activation_checkpointing.py): kept by the
    policy where a fused kernel of torch's sdpa computes them.
    """
    if not knobs.selective or knobs.attention not in ("fused", "masked"):
        return 0
    return layer.query_size * knobs.default.compute_bytes + layer.num_attention_heads * FP32


def _segments_of(
    setup: TrainingSetup, model: ModelSpec, layer: LayerSpec, knobs: LayerKnobs, layers: tuple[int, ...]
) -> list[Segment]:
    """Segments of layers of one kind that get a stream of one width."""
    limit = _checkpointed_layers(setup, model)
    # Nothing asks for the embeddings' gradient in a LoRA run without checkpoints.
    groups = {
        (True, True): [i for i in layers if i < limit],
        (False, False): [i for i in layers if i >= limit and i == 0 and setup.uses_lora],
        (False, True): [i for i in layers if i >= limit and not (i == 0 and setup.uses_lora)],
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
            Segment(
                indices=tuple(sorted(indices)),
                checkpointed=checkpointed,
                input_bytes_per_token=layer.hidden_size * knobs.stream_bytes,
                selected_bytes_per_token=_selected(layer, knobs) if checkpointed else 0,
                replay=layer_replay(layer, own, checkpointed=checkpointed, input_requires_grad=input_grad),
                layer=layer,
                knobs=own,
                input_requires_grad=input_grad,
            )
        )
    return found
