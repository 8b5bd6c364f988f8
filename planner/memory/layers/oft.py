"""An OFT adapter on the tape, before a linear layer's base weight: the input's blocks are rotated by matrices
that are made of skew-symmetric ones in each pass (Cayley's transform as a sum of five terms).

Source: PEFT tuners/oft/layer.py (OFTRotationModule, Linear.forward).
"""

from __future__ import annotations

from planner.memory.layers.base_weight import LinearKind, base_backward, base_forward, weight_gradient
from planner.memory.tape.tape import Buffer, Tape, Value


def oft_linear(tape: Tape, kind: LinearKind, x: Value, inputs: int, outputs: int) -> Value:
    """Put on the tape one linear layer on `x` as rotated; returns its output, held once."""
    width, compute = kind.adapter_width, kind.adapter_compute_width
    wide = tape.tokens(inputs * width) if width != x.width else None
    rotation, saved_powers = _rotation(tape, kind, inputs)
    read = wide or x.buffer
    read.holders += 1
    narrow = rotation_cast = None
    if width != compute:
        narrow = tape.tokens(inputs * compute)
        tape.free(read)
        read = narrow
        rotation_cast = tape.fixed(inputs * kind.rank * compute)
    saved_input = tape.save(read)
    saved_rotation = tape.save(rotation_cast or rotation) if x.requires_grad else None
    by_block = tape.tokens(inputs * compute)
    tape.free(read, rotation_cast)
    rotated = tape.tokens(inputs * compute)
    held = tape.tokens(inputs * width) if width != compute else None
    tape.free(by_block, rotation)
    if held is not None:
        tape.free(rotated)
    tape.free(wide)
    if width != x.width:
        rotated = tape.tokens(inputs * x.width)
    # A name holds what was rotated, in the adapter's dtype, until the layer returns.
    turned = Value(rotated, True, x.width)
    if not kind.quantized:
        # The base layer's node saves its weight: a recomputation that ends there has come this far.
        tape.save(tape.fixed(0))
    base = base_forward(tape, kind, turned, inputs, outputs)
    tape.free(rotated, held)

    def backward() -> None:
        base_backward(tape, kind, turned, tape.take_grad(base), base.width, inputs, outputs)
        grad = tape.take_grad(turned)
        for other in (width, compute) if width != compute else ():
            cast = tape.tokens(inputs * other)
            tape.free(grad)
            grad = cast
        block_bytes = inputs * kind.rank * compute
        x_grad = tape.tokens(inputs * compute) if x.requires_grad else None
        rotation_grad = tape.fixed(block_bytes)
        tape.free(saved_input, saved_rotation, grad)
        if x_grad is not None:
            for other in (width, x.width) if width != compute else ():
                cast = tape.tokens(inputs * other)
                tape.free(x_grad)
                x_grad = cast
            tape.add_grad(x, x_grad, view=False)
        _rotation_backward(tape, kind, rotation_grad, saved_powers, inputs)

    tape.nodes.append(backward)
    return base


def rotation_elements(inputs: int, block: int) -> int:
    """Trained values of a layer: the upper triangle of each block, without its diagonal."""
    return inputs // block * (block * (block - 1) // 2)


def _rotation(tape: Tape, kind: LinearKind, inputs: int) -> tuple[Buffer, list[Buffer | None]]:
    """The rotations of all blocks, and what their backward reads."""
    size, narrow = inputs * kind.rank * kind.adapter_width, inputs * kind.rank * kind.adapter_compute_width
    filled = tape.fixed(size)
    skew = tape.fixed(size)
    tape.free(filled)
    rotation = tape.fixed(size)
    power, saved = skew, []
    for _ in range(3):
        # Each product reads the power before it and the skew matrices, both cast under autocast.
        reads = [power, skew]
        if narrow != size:
            reads = [tape.fixed(narrow) for _ in reads]
        following = tape.fixed(narrow)
        saved += [tape.save(one) for one in reads]
        if narrow != size:
            tape.free(*reads)
        if power is not skew:
            tape.free(power)
        power = following
    tape.free(power, skew)
    return rotation, saved


def _rotation_backward(
    tape: Tape, kind: LinearKind, grad: Buffer, saved: list[Buffer | None], inputs: int
) -> None:
    size = inputs * kind.rank * kind.adapter_width
    held = [tape.fixed(size) for _ in range(3)]
    tape.free(*saved, grad)
    tape.free(*held[1:])
    negative = tape.fixed(size)
    total = tape.fixed(size)
    tape.free(held[0], negative)
    weight_gradient(tape, kind, rotation_elements(inputs, kind.rank), kind.adapter_width)
    tape.free(total)
