"""Activations: what each kind of decoder layer keeps for backward, and the peaks of its passes.

One tape per layer kind and set of knobs (planner/memory/decoder/layer.py) answers every length and batch.
"""

from __future__ import annotations

from functools import lru_cache

from planner.base.units import FP32
from planner.base.values import dataclass
from planner.memory.decoder.layer import run_final_norm, run_layer
from planner.memory.layers.experts import routing_width
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.layers.linear import early_gradients
from planner.memory.layers.norms import FP32_NORMS, norm_saves_input
from planner.memory.tape.tape import ACTIVATIONS, GRADIENTS, Moment, Moments, Size, Tape, Value, prune
from planner.memory.traced.replay import gradients_before_saved, saves_input, traced_pass
from planner.models.spec import LayerSpec

NOTHING: Moment = (Size(), Size(), Size())


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMemory:
    """What one decoder layer does to live memory.

    `forward` are the moments of a forward pass that keeps nothing, `saved` what a forward pass keeps for
    backward, `shared` what of that more than one node saves, `forward_saving` the moments of that pass (what
    it has kept so far included), `backward` the moments of the backward pass with all that this layer holds
    (recomputed or kept), the incoming gradient and gradients of its own weights included; `gradients` what
    it leaves of those. `keeps_input` says that the layer's input itself is kept: as its checkpoint, or in
    `saved` for a linear layer that reads it. `output_width` is the width of the output's elements.
    """

    forward: Moments
    forward_saving: Moments
    saved: Moment
    shared: Moment
    backward: Moments
    gradients: Moment
    output_width: int
    keeps_input: bool = False


@lru_cache(maxsize=4096)
def layer_memory(
    layer: LayerSpec, knobs: LayerKnobs, *, checkpointed: bool, input_requires_grad: bool
) -> LayerMemory:
    """Count one layer; `input_requires_grad` is false for a LoRA run's first layer without checkpoints."""
    width = layer.hidden_size * knobs.stream_width
    tape = Tape(saves=True, recomputes=checkpointed)
    # The timeline counts checkpoints; any other input is there at least until the forward pass is done.
    hidden = Value(tape.tokens(0 if checkpointed else width), input_requires_grad or checkpointed)
    early = [tape.tokens(size) for size in gradients_before(layer, knobs)] if checkpointed else []
    output = run_layer(tape, layer, knobs, hidden)
    keeps_input = checkpointed or hidden.buffer.holders > 1
    if checkpointed:
        tape.stop_after_last_save()
        tape.free(output.buffer, *early)
        saved = shared = NOTHING
        forward_saving = Moments()
    else:
        tape.free(output.buffer, hidden.buffer)
        saved, shared = tape.live, tape.shared
        forward_saving = tape.moments()
        tape.forget_moments()
    output.grad = tape.tokens(layer.hidden_size * output.width)
    tape.backward()
    tape.free(hidden.grad)
    return LayerMemory(
        forward=_forward(layer, knobs.accumulating(False))[0],
        forward_saving=forward_saving,
        saved=saved,
        shared=shared,
        backward=tape.moments(),
        gradients=tape.live,
        output_width=output.width,
        keeps_input=keeps_input,
    )


@lru_cache(maxsize=4096)
def _forward(layer: LayerSpec, knobs: LayerKnobs) -> tuple[Moments, int]:
    """The moments of a pass that keeps nothing, and the width of the hidden states that leave it."""
    tape = Tape(saves=False)
    output = run_layer(tape, layer, knobs, Value(tape.tokens(0), False))
    return tape.moments(), output.width


def forward_alone(layer: LayerSpec, knobs: LayerKnobs) -> Moments:
    """The moments of a pass that keeps nothing, its input and output left out."""
    return _forward(layer, knobs)[0]


def output_width(layer: LayerSpec, knobs: LayerKnobs) -> int:
    """Width of the hidden states that leave a layer: wider than those that enter it after an fp32 branch."""
    return _forward(layer, knobs.accumulating(False))[1]


def gradients_before(layer: LayerSpec, knobs: LayerKnobs) -> list[float]:
    """Bytes a token of gradients that are there when a checkpointed layer starts to be recomputed.

    The incoming one, and what backward makes of it before a node asks for a saved tensor: a cast to fp32 by
    an output norm, else scalings by the residual multiplier and by alpha / rank.
    """
    if layer.traced is not None:
        return gradients_before_saved(traced_pass(layer.traced, layer, knobs), layer, knobs)
    stream = output_width(layer, knobs)
    width = layer.hidden_size * stream
    if layer.output_norms:
        casts = layer.norm in FP32_NORMS and stream != FP32 and not knobs.liger
        return [width, layer.hidden_size * FP32] if casts else [width]
    if layer.experts:
        # Each expert's share of it, before the permutation is asked for that puts the shares in order.
        shares = layer.experts_per_token * layer.hidden_size * routing_width(layer, stream)
        return [width, shares]
    own = early_gradients(knobs.kind("down_proj"), layer.hidden_size, stream)
    return [width, *([width] if layer.residual_multiplier else []), *own]


def final_norm_saves_input(layer: LayerSpec, knobs: LayerKnobs) -> bool:
    """Whether the norm after the last layer saves the hidden states themselves."""
    if layer.traced is not None:
        return saves_input(traced_pass(layer.traced, layer, knobs))
    return norm_saves_input(knobs, knobs.stream_width)


@lru_cache(maxsize=4096)
def final_norm_memory(layer: LayerSpec, knobs: LayerKnobs) -> LayerMemory:
    """The norm after the last decoder layer; its `saved` lies beside checkpoints in the head's passes.

    Where it saves the hidden states themselves they count here, else in the timeline while they last.
    """
    tape = Tape(saves=True)
    counted = layer.hidden_size * knobs.stream_width if final_norm_saves_input(layer, knobs) else 0
    hidden = Value(tape.tokens(counted), True, knobs.stream_width)
    output = run_final_norm(tape, layer, knobs, hidden)
    tape.free(output.buffer, hidden.buffer)
    saved, shared = tape.live, tape.shared
    forward = tape.moments()
    tape.forget_moments()
    output.grad = tape.tokens(layer.hidden_size * output.width)
    tape.backward()
    moments = tape.moments()
    tape.free(hidden.grad)
    return LayerMemory(
        forward=forward,
        forward_saving=forward,
        saved=saved,
        shared=shared,
        backward=moments,
        gradients=tape.live,
        output_width=output.width,
    )


def peak(moments: Moments, tokens: int, scores: int) -> tuple[float, Moment]:
    """The largest of the moments for a micro-step of that size, in bytes, and the moment itself."""
    best, chosen = 0.0, NOTHING
    for constant, per_token, per_score, moment in moments.totals:
        size = constant + tokens * per_token + scores * per_score
        if size > best:
            best, chosen = size, moment
    return best, chosen


def at(moment: Moment, tokens: int, scores: int) -> float:
    """Bytes of a moment, all categories together."""
    a, b, c = moment
    return (
        (a[0] + tokens * a[1] + scores * a[2])
        + (b[0] + tokens * b[1] + scores * b[2])
        + (c[0] + tokens * c[1] + scores * c[2])
    )


__all__ = [
    "ACTIVATIONS",
    "GRADIENTS",
    "LayerMemory",
    "at",
    "final_norm_memory",
    "layer_memory",
    "peak",
    "prune",
]
