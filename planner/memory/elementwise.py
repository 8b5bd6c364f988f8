"""Replay of elementwise operations between the layers' matrix products."""

from __future__ import annotations

from planner.memory.tape import Buffer, Tape, Value


def split(tape: Tape, fused: Value, sizes: tuple[int, ...], width: int) -> list[Value]:
    """Views of a fused projection; their gradients are padded to full width and summed."""
    whole = sum(sizes) * width
    parts = []
    for _ in sizes:
        parts.append(Value(hold(fused.buffer), fused.requires_grad))

    def backward() -> None:
        for part in parts:
            padded = tape.tokens(whole)
            if part.grad is not None:
                tape.free(tape.take_grad(part))
            tape.add_grad(fused, padded)

    if fused.requires_grad:
        tape.nodes.append(backward)
    return parts


def activation(tape: Tape, x: Value, size: float) -> Value:
    """Activation function; takes over the caller's hold on `x`."""
    result = Value(tape.tokens(size), x.requires_grad)
    saved = tape.save(x.buffer)
    tape.free(x.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        x_grad = tape.tokens(size)
        tape.free(grad, saved)
        tape.add_grad(x, x_grad)

    if x.requires_grad:
        tape.nodes.append(backward)
    return result


def multiply(tape: Tape, left: Value, right: Value, size: float) -> Value:
    """Elementwise product; takes over the caller's holds on both factors."""
    result = Value(tape.tokens(size), True)
    saved = (tape.save(left.buffer), tape.save(right.buffer))
    tape.free(left.buffer, right.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        left_grad, right_grad = tape.tokens(size), tape.tokens(size)
        tape.free(*saved, grad)
        tape.add_grad(left, left_grad)
        tape.add_grad(right, right_grad)

    tape.nodes.append(backward)
    return result


def scale(tape: Tape, x: Value, size: float) -> Value:
    """Product with a number; takes over the caller's hold on `x`."""
    result = Value(tape.tokens(size), x.requires_grad)
    tape.free(x.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        scaled = tape.tokens(size)
        tape.free(grad)
        tape.add_grad(x, scaled)

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
