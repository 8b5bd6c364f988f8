"""A VeRA adapter on the tape, beside a linear layer's base weight: two random matrices that all layers share,
frozen in fp32, and two vectors that scale their outputs, trained and held in fp32.

Source: PEFT tuners/vera/layer.py (forward).
"""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.layers.base_weight import LinearKind, base_backward, sum_over_tokens, weight_gradient
from planner.memory.tape.tape import Buffer, Tape, Value


def vera_linear(tape: Tape, kind: LinearKind, x: Value, base: Value, inputs: int, outputs: int) -> Value:
    """Put on the tape what follows the base layer, `base`; takes over the hold on it."""
    rank, compute = kind.rank, kind.adapter_compute_width
    wide = tape.tokens(inputs * FP32) if x.width != FP32 else None
    shared_down = _cast(tape, kind, inputs)
    narrow = tape.tokens(inputs * compute) if compute != FP32 else None
    down = tape.tokens(rank * compute)
    saved_weights = [tape.save(shared_down)] if shared_down is not None and x.requires_grad else []
    tape.free(narrow, shared_down)
    saved_down = tape.save(down)
    product = tape.tokens(rank * FP32)
    tape.free(down)
    shared_up = _cast(tape, kind, outputs)
    narrow = tape.tokens(rank * compute) if compute != FP32 else None
    up = tape.tokens(outputs * compute)
    saved_up_weight = tape.save(shared_up) if shared_up is not None else None
    tape.free(product, narrow, shared_up)
    saved_up = tape.save(up)
    scaled = tape.tokens(outputs * FP32)
    tape.free(up)
    summed = tape.tokens(outputs * FP32)
    tape.free(scaled, base.buffer)
    if base.width != FP32:
        cast = tape.tokens(outputs * base.width)
        tape.free(summed)
        summed = cast
    tape.free(wide)
    result = Value(summed, True, base.width)

    def backward() -> None:
        grad = tape.take_grad(result)
        to_base = grad
        if base.width != FP32:
            cast = tape.tokens(outputs * FP32)
            tape.free(grad)
            grad = cast
            to_base = tape.tokens(outputs * base.width)
        else:
            grad.holders += 1
        up_grad = _scaling_backward(tape, kind, grad, saved_up, outputs)
        product_grad = tape.tokens(rank * compute)
        tape.free(up_grad, saved_up_weight)
        if compute != FP32:
            cast = tape.tokens(rank * FP32)
            tape.free(product_grad)
            product_grad = cast
        down_grad = _scaling_backward(tape, kind, product_grad, saved_down, rank)
        if not x.requires_grad:
            tape.free(down_grad, to_base)
            return
        _input_backward(tape, x, compute, inputs, (down_grad, *saved_weights))
        base_backward(tape, kind, x, to_base, base.width, inputs, outputs)

    tape.nodes.append(backward)
    return result


def _input_backward(tape: Tape, x: Value, compute: int, inputs: int, read: tuple[Buffer | None, ...]) -> None:
    """The gradient of the layer's input, back through the casts that it was taken by; lets go of `read`."""
    grad = tape.tokens(inputs * compute)
    tape.free(*read)
    for width in (FP32, x.width) if x.width != FP32 else ():
        cast = tape.tokens(inputs * width)
        tape.free(grad)
        grad = cast
    tape.add_grad(x, grad, view=x.width == FP32)


def _cast(tape: Tape, kind: LinearKind, features: int) -> Buffer | None:
    """The part of a shared matrix that a layer takes, in the compute dtype; a view where that is fp32."""
    compute = kind.adapter_compute_width
    return None if compute == FP32 else tape.fixed(kind.rank * features * compute)


def _scaling_backward(
    tape: Tape, kind: LinearKind, grad: Buffer, saved: Buffer | None, features: int
) -> Buffer:
    """Backward of a product by a vector, from a gradient in fp32 that is taken over; the scaled one's."""
    to_vector, scaled = tape.tokens(features * FP32), tape.tokens(features * FP32)
    tape.free(saved)
    sum_over_tokens(tape, features, to_vector)
    weight_gradient(tape, kind, features, FP32)
    if kind.adapter_compute_width != FP32:
        cast = tape.tokens(features * kind.adapter_compute_width)
        tape.free(scaled)
        scaled = cast
    tape.free(grad)
    return scaled
