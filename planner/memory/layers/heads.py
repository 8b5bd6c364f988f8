"""What attention does with heads outside its kernels."""

from __future__ import annotations

from planner.memory.tape.tape import Buffer, Tape, Value


def transposed(tape: Tape, buffer: Buffer, size: float) -> Buffer:
    """A copy with heads and positions swapped; takes over the hold on the original."""
    copied = tape.tokens(size)
    tape.free(buffer)
    return copied


def sum_heads(tape: Tape, grads: list[Buffer], indices: tuple[int, ...], size: float) -> None:
    """Sum gradients of repeated keys or values over the heads that share them, in that order."""
    for index in indices:
        summed = tape.tokens(size)
        tape.free(grads[index])
        grads[index] = summed


def hand_back(tape: Tape, targets: tuple[Value, ...], grads: list[Buffer]) -> None:
    """Give each tensor its gradient."""
    for target, grad in zip(targets, grads, strict=True):
        tape.add_grad(target, grad)
