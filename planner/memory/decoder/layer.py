"""One decoder layer on the tape, op by op, as transformers runs it.

Sources: transformers models/{llama,qwen2,qwen3,mistral,gemma2,gemma3,phi3,olmo2,granite}/modeling_*.py,
integrations/sdpa_attention.py; allocation traces of real steps on an H100 (tests/stack/traces).
"""

from __future__ import annotations

from planner.memory.compiled.layer import run_compiled_layer
from planner.memory.layers.attention import attention
from planner.memory.layers.elementwise import activation, add, again, hold, multiply, scale, split
from planner.memory.layers.experts import experts
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.layers.liger import liger_gated
from planner.memory.layers.linear import linear
from planner.memory.layers.norms import norm
from planner.memory.tape.tape import Tape, Value
from planner.memory.traced.replay import run_traced
from planner.models.spec import LayerSpec


def run_layer(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, hidden: Value) -> Value:
    """Put the forward pass on the tape, backward with it. The caller keeps its hold on `hidden`."""
    hidden.width = knobs.stream_width
    if layer.traced is not None:
        return run_traced(tape, layer.traced, layer, knobs, hidden)
    if knobs.compiled:
        return run_compiled_layer(tape, layer, knobs, hidden)
    residual = hidden
    normed = norm(tape, layer, knobs, hidden, layer.hidden_size) if layer.input_norms else again(hidden)
    attended = attention(tape, layer, knobs, normed)
    tape.free(normed.buffer)
    middle = _add_residual(tape, layer, knobs, residual, attended)
    normed = norm(tape, layer, knobs, middle, layer.hidden_size) if layer.input_norms else again(middle)
    output = _mlp(tape, layer, knobs, normed)
    tape.free(normed.buffer)
    result = _add_residual(tape, layer, knobs, middle, output)
    tape.free(middle.buffer)
    tape.leave_layer()
    return result


def run_final_norm(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, hidden: Value) -> Value:
    """Put the norm after the last layer on the tape; `layer` is the model's norm_layer."""
    if layer.traced is not None:
        return run_traced(tape, layer.traced, layer, knobs, hidden)
    return norm(tape, layer, knobs, hidden, layer.hidden_size)


def _mlp(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value) -> Value:
    inner = layer.intermediate_size
    held = None
    if layer.experts:
        return experts(tape, layer, knobs.kind("experts"), x, router=knobs.kind("router"))
    if layer.fused_gate_up:
        fused = linear(tape, knobs.kind("gate_up_proj"), x, layer.hidden_size, 2 * inner)
        gate, up = split(tape, fused, (inner, inner), chunked=not knobs.liger)
        # A local variable holds on to the projection until the MLP returns.
        held = hold(fused.buffer)
        tape.free(fused.buffer)
        activated = gate if knobs.liger else activation(tape, gate, inner)
    else:
        gate = linear(tape, knobs.kind("gate_proj"), x, layer.hidden_size, inner)
        activated = gate if knobs.liger else activation(tape, gate, inner)
        up = linear(tape, knobs.kind("up_proj"), x, layer.hidden_size, inner)
    if knobs.liger:
        product = liger_gated(tape, gate, up, inner, views=layer.fused_gate_up)
    else:
        product = multiply(tape, activated, up, inner)
    output = linear(tape, knobs.kind("down_proj"), product, inner, layer.hidden_size)
    tape.free(product.buffer, held)
    return output


def _add_residual(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, residual: Value, branch: Value) -> Value:
    """residual + branch, the branch normed or scaled first where the model does; takes over `branch`."""
    if layer.output_norms:
        normed = norm(tape, layer, knobs, branch, layer.hidden_size)
        tape.free(branch.buffer)
        branch = normed
    if layer.residual_multiplier:
        branch = scale(tape, branch, layer.hidden_size)
    return add(tape, residual, branch, layer.hidden_size)
