"""Replay of RMSNorm, in the two forms that transformers has."""

from __future__ import annotations

from planner.memory.elementwise import hold
from planner.memory.layer_knobs import FP32, LayerKnobs
from planner.memory.linear import LinearKind, weight_gradient
from planner.memory.tape import Buffer, Tape, Value
from planner.model_spec import LayerSpec

FP32_NORMS = ("rms_fp32_weight",)
NORM_SCRATCH_BYTES = 2 * FP32
"""Bytes an element of the scratch buffer in which CUDA reduces a trained norm weight's gradient over tokens
(seen in traces llama_f and qwen3_f)."""


def norm(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value, size: int, *, groups: int = 1) -> Value:
    """RMSNorm of `size` features a token in `groups` (heads): the fp32 input and inverse roots are saved."""
    kind = knobs.default
    width = kind.activation_bytes
    casts = width != FP32
    wide = tape.tokens(size * FP32) if casts else hold(x.buffer)
    tape.free(tape.tokens(size * FP32))
    root = tape.tokens(groups * FP32)
    saved_wide = tape.save(wide) if x.requires_grad else None
    saved_root = tape.save(root) if x.requires_grad else None
    tape.free(root)
    scaled = tape.tokens(size * FP32)
    saved_scaled = None
    if layer.norm in FP32_NORMS:
        if kind.trained:
            saved_scaled = tape.save(scaled)
        weighted = tape.tokens(size * FP32)
        # Gemma's norm lets go of the unweighted tensor here, OLMo 2's (no input norms) when it returns.
        held = None if layer.input_norms else hold(scaled)
        tape.free(scaled, wide)
        result = Value(tape.tokens(size * width) if casts else hold(weighted), x.requires_grad)
        tape.free(weighted, held)
    else:
        tape.free(wide)
        narrow = tape.tokens(size * width) if casts else hold(scaled)
        if kind.trained:
            saved_scaled = tape.save(narrow)
        result = Value(tape.tokens(size * width), x.requires_grad)
        tape.free(narrow, scaled)
    if x.requires_grad:
        fp32 = layer.norm in FP32_NORMS
        saved = (saved_wide, saved_root)
        tape.nodes.append(lambda: _norm_backward(tape, kind, x, result, size, saved, saved_scaled, fp32))
    return result


def _norm_backward(
    tape: Tape,
    kind: LinearKind,
    x: Value,
    result: Value,
    size: int,
    saved: tuple[Buffer | None, Buffer | None],
    saved_scaled: Buffer | None,
    fp32_weight: bool,
) -> None:
    width = kind.activation_bytes
    casts = width != FP32
    grad = tape.take_grad(result)
    if fp32_weight and casts:
        wide = tape.tokens(size * FP32)
        tape.free(grad)
        grad = wide
    product = FP32 if fp32_weight else width
    weighted = tape.tokens(size * product)
    if kind.trained:
        # The weight's gradient: a product per element, reduced over tokens with a global scratch buffer.
        elementwise = tape.tokens(size * product)
        tape.free(tape.tokens(size * NORM_SCRATCH_BYTES), elementwise, saved_scaled)
        weight_gradient(tape, kind, size, kind.adapter_bytes)
    tape.free(grad)
    grad = weighted
    if not fp32_weight and casts:
        wide = tape.tokens(size * FP32)
        tape.free(grad)
        grad = wide
    to_rsqrt = tape.tokens(size * FP32)
    to_input = tape.tokens(size * FP32)
    tape.free(to_rsqrt, grad)
    expanded = tape.tokens(size * FP32)
    power = tape.tokens(size * FP32)
    doubled = tape.tokens(size * FP32)
    through_square = tape.tokens(size * FP32)
    tape.free(doubled, power, expanded, through_square, *saved)
    if casts:
        narrow = tape.tokens(size * width)
        tape.free(to_input)
        to_input = narrow
    tape.add_grad(x, to_input)
