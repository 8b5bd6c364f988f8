"""What attention does with heads outside its kernels."""

from __future__ import annotations

from collections.abc import Sequence

from planner.memory.tape.tape import Buffer, Tape, Value


def transposed(tape: Tape, buffer: Buffer, size: float) -> Buffer:
    """A copy with heads and positions swapped; takes over the hold on the original."""
    copied = tape.tokens(size)
    tape.free(buffer)
    return copied


def tracked(*inputs: Value) -> bool:
    """Whether an operation on these has a backward pass; a fused kernel's computes all inputs' gradients."""
    return any(one.requires_grad for one in inputs)


def sum_heads(
    tape: Tape, targets: Sequence[Value], grads: list[Buffer | None], indices: Sequence[int], size: float
) -> None:
    """Sum gradients of repeated keys or values over the heads that share them, in that order, where something
    asks for them.
    """
    for index in indices:
        if targets[index].requires_grad:
            summed = tape.tokens(size)
            tape.free(grads[index])
            grads[index] = summed


def hand_back(tape: Tape, targets: Sequence[Value], grads: Sequence[Buffer | None]) -> None:
    """Give each tensor its gradient; null where none was computed."""
    for target, grad in zip(targets, grads, strict=True):
        if grad is not None:
            tape.add_grad(target, grad)
