"""A MiSS adapter on the tape, beside a linear layer's base weight: the input's blocks are summed, and one
matrix of rank x outputs multiplies the sum.

Source: PEFT tuners/miss/layer.py (MissLinear.forward, init_weights true).
"""

from __future__ import annotations

from planner.memory.layers.base_weight import LinearKind, base_backward, weight_gradient
from planner.memory.tape.tape import Tape, Value


def miss_linear(tape: Tape, kind: LinearKind, x: Value, base: Value, inputs: int, outputs: int) -> Value:
    """Put on the tape what follows the base layer, `base`; takes over the hold on it."""
    rank, width, compute = kind.rank, kind.adapter_width, kind.adapter_compute_width
    padded = -(-inputs // rank) * rank
    longer = tape.tokens(padded * x.width) if padded != inputs else None
    wide = tape.tokens(padded * width) if width != x.width else None
    tape.free(longer)
    total = tape.tokens(rank * width)
    if width != compute:
        narrow = tape.tokens(rank * compute)
        tape.free(total)
        total = narrow
    casts = tape.cast_weights(rank * outputs * compute) if width > compute else ()
    saved = tape.save(total)
    out = tape.tokens(outputs * compute)
    tape.free(total)
    result = Value(tape.tokens(outputs * base.width), True, base.width)
    tape.free(base.buffer, out, wide)

    def backward() -> None:
        grad = tape.take_grad(result)
        weight_gradient(tape, kind, rank * outputs, width)
        total_grad = tape.tokens(rank * compute)
        tape.free(saved, *casts)
        if not x.requires_grad:
            tape.free(total_grad, grad)
            return
        if width != compute:
            cast = tape.tokens(rank * width)
            tape.free(total_grad)
            total_grad = cast
        spread = tape.tokens(padded * width)
        tape.free(total_grad)
        if width != x.width:
            cast = tape.tokens(padded * x.width)
            tape.free(spread)
            spread = cast
        tape.add_grad(x, spread, view=padded != inputs)
        base_backward(tape, kind, x, grad, base.width, inputs, outputs)

    tape.nodes.append(backward)
    return result
