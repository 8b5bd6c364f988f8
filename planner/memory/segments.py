"""Segments: the decoder layers of one kind that a setup treats alike, with their replays."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from planner.memory.activations import LayerReplay, final_norm_replay, layer_replay
from planner.memory.adapter import Trainables
from planner.memory.layer_knobs import LayerKnobs
from planner.memory.linear import LinearKind
from planner.memory.weights import DTYPE_BYTES
from planner.model_spec import LayerSpec, ModelSpec
from planner.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Layers at `indices` (ascending), alike in kind and checkpointing.

    `layer`, `knobs` and `input_requires_grad` are what their replay was made from.
    """

    indices: tuple[int, ...]
    checkpointed: bool
    input_bytes_per_token: int
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
    windows = tuple(_window(layer, setup.max_length) for layer in model.layers)
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
        setup.lora_dropout > 0,
        setup.bnb_4bit_use_double_quant,
        attention,
        windows,
        checkpointed,
        accumulating,
        padded,
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
        known = _SEGMENTS[key] = _replay_all(
            setup, model, kinds, default, attention=attention, windows=windows, padded=padded
        )
    return known


def _checkpointed_layers(setup: TrainingSetup, model: ModelSpec) -> int:
    if not setup.gradient_checkpointing:
        return 0
    return model.num_hidden_layers if setup.checkpointed_layers is None else setup.checkpointed_layers


def _window(layer: LayerSpec, length: int) -> bool:
    """Whether a sliding window cuts sequences of that length, so that sdpa needs a mask."""
    return layer.sliding_window is not None and layer.sliding_window < length


def _linear_kind(setup: TrainingSetup, rank: int, element_bytes: int, *, accumulating: bool) -> LinearKind:
    return LinearKind(
        quantized=setup.method == "qlora",
        trained=setup.method == "full",
        rank=rank,
        dropout=setup.lora_dropout > 0,
        double_quant=setup.bnb_4bit_use_double_quant,
        activation_bytes=DTYPE_BYTES[setup.dtype],
        adapter_bytes=element_bytes,
        accumulating=accumulating,
    )


def _replay_all(
    setup: TrainingSetup,
    model: ModelSpec,
    kinds: tuple[tuple[str, LinearKind], ...],
    default: LinearKind,
    *,
    attention: str,
    windows: tuple[bool, ...],
    padded: bool,
) -> tuple[tuple[Segment, ...], LayerReplay]:
    limit = _checkpointed_layers(setup, model)
    found = []
    for layer, window in zip(model.layers, windows, strict=True):
        knobs = LayerKnobs(kinds=kinds, default=default, attention=attention, masked=padded or window)
        # Nothing asks for the embeddings' gradient in a LoRA run without checkpoints.
        groups = {
            (True, True): [i for i in layer.indices if i < limit],
            (False, False): [i for i in layer.indices if i >= limit and i == 0 and setup.uses_lora],
            (False, True): [i for i in layer.indices if i >= limit and not (i == 0 and setup.uses_lora)],
        }
        for (checkpointed, input_grad), indices in groups.items():
            if indices:
                found.append(
                    Segment(
                        indices=tuple(sorted(indices)),
                        checkpointed=checkpointed,
                        input_bytes_per_token=layer.hidden_size * default.activation_bytes,
                        replay=layer_replay(
                            layer, knobs, checkpointed=checkpointed, input_requires_grad=input_grad
                        ),
                        layer=layer,
                        knobs=knobs,
                        input_requires_grad=input_grad,
                    )
                )
    last = model.layers[-1]
    knobs = LayerKnobs(kinds=kinds, default=default, attention=attention, masked=False)
    return tuple(found), final_norm_replay(last, knobs)
