"""RMSNorm on the tape, in the two forms that transformers has."""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.layers.base_weight import LinearKind, reduced_gradient
from planner.memory.layers.elementwise import hold
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.layers.liger import liger_norm
from planner.memory.tape.tape import Buffer, Tape, Value
from planner.models.spec import LayerSpec

FP32_NORMS = ("rms_fp32_weight",)


def norm_saves_input(knobs: LayerKnobs, width: int) -> bool:
    """Whether what a norm saves is its input itself, of that width, and not an fp32 copy of it."""
    return knobs.liger or width == FP32


def norm(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value, size: int, *, groups: int = 1) -> Value:
    """RMSNorm of `size` features a token in `groups` (heads): the fp32 input and inverse roots are saved."""
    kind = knobs.default
    if knobs.liger:
        in_place = layer.norm not in FP32_NORMS
        return liger_norm(tape, layer, knobs, x, size, groups=groups, in_place=in_place)
    casts = x.width != FP32
    wide = tape.tokens(size * FP32) if casts else hold(x.buffer)
    tape.free(tape.tokens(size * FP32))
    root = tape.tokens(groups * FP32)
    saved_wide = tape.save_twice(wide) if x.requires_grad else None
    scaled = tape.tokens(size * FP32)
    saved_root = tape.save(root) if x.requires_grad else None
    tape.free(root)
    saved_scaled = None
    fp32_weight = layer.norm in FP32_NORMS
    if fp32_weight:
        if kind.trained:
            saved_scaled = tape.save(scaled)
        tape.free(wide)
        weighted = tape.tokens(size * FP32)
        # Gemma's norm lets go of the unweighted tensor here, OLMo 2's (no input norms) when it returns.
        held = None if layer.input_norms else hold(scaled)
        tape.free(scaled)
        result = Value(tape.tokens(size * x.width) if casts else hold(weighted), x.requires_grad, x.width)
        tape.free(weighted, held)
    else:
        tape.free(wide)
        narrow = tape.tokens(size * x.width) if casts else hold(scaled)
        if kind.trained:
            saved_scaled = tape.save(narrow)
        width = max(x.width, knobs.norm_width)
        result = Value(tape.tokens(size * width), x.requires_grad, width)
        tape.free(narrow, scaled)
    if x.requires_grad:
        saved = (saved_wide, saved_root)
        tape.nodes.append(lambda: _norm_backward(tape, kind, x, result, size, saved, saved_scaled, layer))
    return result


def _norm_backward(
    tape: Tape,
    kind: LinearKind,
    x: Value,
    result: Value,
    size: int,
    saved: tuple[Buffer | None, Buffer | None],
    saved_scaled: Buffer | None,
    layer: LayerSpec,
) -> None:
    casts, fp32_weight = x.width != FP32, layer.norm in FP32_NORMS
    grad = tape.take_grad(result)
    if fp32_weight and casts:
        wide = tape.tokens(size * FP32)
        tape.free(grad)
        grad = wide
    product = FP32 if fp32_weight else result.width
    # A product's second factor has its gradient first (torch's generated Functions.cpp goes by name: "other",
    # then "self"): Gemma writes the weight second, all others first.
    weight_first = kind.trained and fp32_weight and layer.input_norms
    elementwise = tape.tokens(size * product) if weight_first else None
    weighted = tape.tokens(size * product)
    if kind.trained:
        # The weight's gradient: a product per element, reduced over tokens.
        elementwise = elementwise or tape.tokens(size * product)
        reduced_gradient(tape, kind, size, given=(elementwise, grad), saved=saved_scaled)
    else:
        tape.free(grad)
    grad = weighted
    if product != FP32:
        wide = tape.tokens(size * FP32)
        tape.free(grad)
        grad = wide
    to_rsqrt = tape.tokens(size * FP32)
    to_input = tape.tokens(size * FP32)
    tape.free(to_rsqrt, grad)
    if not casts:
        # No cast lies between: the first gradient goes into the input's at once, the second follows.
        tape.add_grad(x, to_input)
    expanded = tape.tokens(size * FP32)
    power = tape.tokens(size * FP32)
    doubled = tape.tokens(size * FP32)
    through_square = tape.tokens(size * FP32)
    tape.free(doubled, power, expanded)
    if not casts:
        tape.free(*saved)
        tape.add_grad(x, through_square)
        return
    tape.free(through_square, *saved)
    narrow = tape.tokens(size * x.width)
    tape.free(to_input)
    tape.add_grad(x, narrow)
