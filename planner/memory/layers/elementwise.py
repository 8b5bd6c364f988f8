"""Elementwise operations on the tape, between the layers' matrix products.

As autograd does, each saves only what gradients that are asked for read, and has a backward pass only where
one is: nothing asks for that of what comes before the first adapter.
"""

from __future__ import annotations

from planner.memory.tape.tape import Buffer, Tape, Value


def split(tape: Tape, fused: Value, sizes: tuple[int, ...], *, chunked: bool = False) -> list[Value]:
    """Views of a fused projection; their gradients are padded to full width and summed, or, where one call
    of torch.chunk made all of them, joined.
    """
    whole = sum(sizes) * fused.width
    parts = []
    for _ in sizes:
        parts.append(Value(hold(fused.buffer), fused.requires_grad, fused.width))

    def backward() -> None:
        if chunked:
            joined = tape.tokens(whole)
            tape.free(*(tape.take_grad(part) for part in parts))
            tape.add_grad(fused, joined)
            return
        for part in reversed(parts):
            padded = tape.tokens(whole)
            if part.grad is not None:
                tape.free(tape.take_grad(part))
            tape.add_grad(fused, padded)

    if fused.requires_grad:
        tape.nodes.append(backward)
    return parts


def activation(tape: Tape, x: Value, features: int) -> Value:
    """Activation function; takes over the caller's hold on `x`."""
    size = features * x.width
    result = Value(tape.tokens(size), x.requires_grad, x.width)
    saved = tape.save(x.buffer) if x.requires_grad else None
    tape.free(x.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        x_grad = tape.tokens(size)
        tape.free(grad, saved)
        tape.add_grad(x, x_grad)

    if x.requires_grad:
        tape.nodes.append(backward)
    return result


def multiply(tape: Tape, left: Value, right: Value, features: int) -> Value:
    """Elementwise product, in the wider dtype of the two; takes over the caller's holds on both.

    Either factor is saved for the gradient of the other; the second one has its gradient first (torch's
    generated Functions.cpp computes "other" before "self").
    """
    width = max(left.width, right.width)
    result = Value(tape.tokens(features * width), left.requires_grad or right.requires_grad, width)
    saved = (
        tape.save(left.buffer) if right.requires_grad else None,
        tape.save(right.buffer) if left.requires_grad else None,
    )
    tape.free(left.buffer, right.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        asked = [factor for factor in (right, left) if factor.requires_grad]
        grads = [tape.tokens(features * factor.width) for factor in asked]
        tape.free(*saved, grad)
        for factor, own in zip(asked, grads, strict=True):
            tape.add_grad(factor, own)

    if result.requires_grad:
        tape.nodes.append(backward)
    return result


def scale(tape: Tape, x: Value, features: int) -> Value:
    """Product with a number; takes over the caller's hold on `x`."""
    size = features * x.width
    result = Value(tape.tokens(size), x.requires_grad, x.width)
    tape.free(x.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        scaled = tape.tokens(size)
        tape.free(grad)
        tape.add_grad(x, scaled)

    if x.requires_grad:
        tape.nodes.append(backward)
    return result


def add(tape: Tape, left: Value, right: Value, features: int) -> Value:
    """Sum, in the wider dtype of the two; takes over the caller's hold on `right`."""
    width = max(left.width, right.width)
    result = Value(tape.tokens(features * width), left.requires_grad or right.requires_grad, width)
    tape.free(right.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        for addend in (left, right):
            if addend.width == width:
                tape.add_grad(addend, hold(grad))
            elif addend.requires_grad:
                tape.add_grad(addend, tape.tokens(features * addend.width))
        tape.free(grad)

    if result.requires_grad:
        tape.nodes.append(backward)
    return result


def copy(tape: Tape, x: Value, features: int) -> Value:
    """A copy whose gradient is the original's; takes over the caller's hold on `x`."""
    result = Value(tape.tokens(features * x.width), x.requires_grad, x.width)
    tape.free(x.buffer)
    if x.requires_grad:
        tape.nodes.append(lambda: tape.add_grad(x, tape.take_grad(result)))
    return result


def cast(tape: Tape, x: Value, features: int, width: int) -> Value:
    """A copy in another dtype, held once; the same tensor, held once more, if it has that dtype already."""
    if x.width == width:
        return again(x)
    result = Value(tape.tokens(features * width), x.requires_grad, width)

    def backward() -> None:
        grad = tape.take_grad(result)
        back = tape.tokens(features * x.width)
        tape.free(grad)
        tape.add_grad(x, back)

    if x.requires_grad:
        tape.nodes.append(backward)
    return result


def hold(buffer: Buffer) -> Buffer:
    """The same buffer with one more holder."""
    buffer.holders += 1
    return buffer


def again(x: Value) -> Value:
    """The same tensor under a name of its own: one more holder, gradients go to the original."""
    x.buffer.holders += 1
    return x
