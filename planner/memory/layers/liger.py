"""Liger's layer kernels on the tape: what they save, and where they write gradients in place.

Sources: liger_kernel ops/rms_norm.py, ops/swiglu.py, ops/geglu.py, ops/rope.py; allocation traces *_liger*.
"""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.layers.base_weight import weight_gradient
from planner.memory.layers.elementwise import hold
from planner.memory.layers.heads import tracked
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.tape.tape import Buffer, Size, Tape, Value
from planner.models.spec import LayerSpec

MULTIPROCESSORS = 132
"""Programs of the norm's backward kernel, each with a row of the weight's gradient (an H100's; others have
fewer)."""


def liger_norm(
    tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value, size: int, *, groups: int, in_place: bool
) -> Value:
    """RMSNorm: saves the input itself and inverse roots; `in_place`: the gradient overwrites the output's."""
    result = Value(tape.tokens(size * x.width), x.requires_grad, x.width)
    root = tape.tokens(groups * FP32)
    saved = (tape.save(x.buffer), tape.save(root)) if x.requires_grad else ()
    tape.free(root)

    def backward() -> None:
        grad = tape.take_grad(result)
        rows = None
        if knobs.default.trained:
            rows = tape.allocate(Size(constant=MULTIPROCESSORS * (size // groups) * FP32), 1)
        if not in_place:
            x_grad = tape.tokens(size * x.width)
            tape.free(grad)
            grad = x_grad
        if knobs.default.trained:
            weight_gradient(tape, knobs.default, size // groups, knobs.default.adapter_width)
        tape.free(rows, *saved)
        tape.add_grad(x, grad)

    if x.requires_grad:
        tape.nodes.append(backward)
    return result


def liger_gated(tape: Tape, gate: Value, up: Value, features: int, *, views: bool) -> Value:
    """Activation of the gate times up, one kernel; takes over the caller's holds on both.

    Gradients overwrite gate and up themselves. `views` of a fused projection are copied first.
    """
    size = features * gate.width
    inputs: list[Buffer] = []
    for part in (gate, up):
        inputs.append(tape.tokens(size) if views else hold(part.buffer))
    result = Value(tape.tokens(size), tracked(gate, up), gate.width)
    saved = [tape.save(part) for part in inputs] if result.requires_grad else []
    tape.free(*inputs, gate.buffer, up.buffer)

    def backward() -> None:
        tape.free(tape.take_grad(result))
        for target, buffer in zip((gate, up), saved, strict=True):
            if buffer is None:
                raise AssertionError("a kernel that saved nothing has no backward pass")
            tape.add_grad(target, buffer)

    if tape.saves and result.requires_grad:
        tape.nodes.append(backward)
    return result
