"""A LoRA adapter on the tape, beside a linear layer's base weight.

Sources: PEFT tuners/lora/bnb.py and layer.py (forward).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.memory.layers.base_weight import LinearKind, base_backward, weight_gradient
from planner.memory.tape.tape import Buffer, Tape, Value


def adapted(tape: Tape, kind: LinearKind, x: Value, base: Value, inputs: int, outputs: int) -> Value:
    """Put on the tape what follows the base layer, `base`; takes over the hold on it."""
    width = kind.adapter_compute_width
    taken = adapter_input(tape, kind, x, inputs)
    read = read_input(tape, kind, x, taken, inputs)
    saved_input = None if kind.frozen_down else tape.save(read)
    casts = weight_casts(tape, kind, inputs if x.requires_grad else 0, outputs)
    down = tape.tokens(kind.rank * width)
    tape.free(read, taken.dropped)
    saved_down = tape.save(down)
    up = tape.tokens(outputs * width)
    tape.free(down)
    scaled = tape.tokens(outputs * width)
    tape.free(up)
    if not kind.autocast and width != base.width:
        wide = tape.tokens(outputs * base.width)
        tape.free(scaled)
        scaled = wide
    result = Value(tape.tokens(outputs * base.width), True, base.width)
    tape.free(base.buffer, scaled, taken.wide)

    def backward() -> None:
        grad = tape.take_grad(result)
        if base.width != width:
            narrow = tape.tokens(outputs * width)
            scaled = tape.tokens(outputs * width)
            tape.free(narrow)
        else:
            scaled = tape.tokens(outputs * width)
        adapter_backward(tape, kind, x, taken, inputs, outputs, scaled, saved_input, saved_down)
        tape.free(*casts)
        if x.requires_grad:
            base_backward(tape, kind, x, grad, base.width, inputs, outputs)
        else:
            tape.free(grad)

    tape.nodes.append(backward)
    return result


@dataclass(slots=True)
class AdapterInput:
    """What an adapter reads: the layer's input cast to the adapter's dtype (`wide`), what dropout made of
    that (`dropped`) with the `mask` that backward needs, and the copy in the dtype of the matrix product
    (`narrow`); null where there is no such step. `width` is that of what is last but `narrow`.
    """

    wide: Buffer | None
    mask: Buffer | None
    dropped: Buffer | None
    narrow: Buffer | None
    width: int


def adapter_input(tape: Tape, kind: LinearKind, x: Value, inputs: int) -> AdapterInput:
    """Cast and drop out.

    PEFT casts the input to the adapter's dtype (tuners/lora/layer.py, forward; for NF4 only outside
    autocast, tuners/lora/bnb.py). That copy lives until the module returns, dropout's output until lora_A
    does.
    """
    casts = kind.adapter_width != x.width and not (kind.quantized and kind.autocast)
    width = kind.adapter_width if casts else x.width
    wide = tape.tokens(inputs * width) if casts else None
    mask = dropped = None
    if kind.dropout:
        mask = tape.tokens(inputs)
        dropped = tape.tokens(inputs * width)
        if not (tape.saves and x.requires_grad):
            tape.free(mask)
            mask = None
    return AdapterInput(wide=wide, mask=mask, dropped=dropped, narrow=None, width=width)


def read_input(tape: Tape, kind: LinearKind, x: Value, taken: AdapterInput, inputs: int) -> Buffer:
    """What the adapter's product reads, held once more: autocast makes a copy where dtypes differ."""
    if taken.width != kind.adapter_compute_width:
        taken.narrow = tape.tokens(inputs * kind.adapter_compute_width)
        return taken.narrow
    buffer = taken.dropped or taken.wide or x.buffer
    buffer.holders += 1
    return buffer


def weight_casts(tape: Tape, kind: LinearKind, inputs: int, outputs: int) -> tuple[Buffer, ...]:
    """Copies of fp32 adapter weights in the compute dtype: autocast keeps them until backward is done.

    `inputs` is 0 where the input wants no gradient: backward does not need lora_A's copy then.
    """
    if kind.adapter_width <= kind.adapter_compute_width:
        return ()
    copy = kind.rank * kind.compute_width
    return tape.cast_weights(*(copy * width for width in (inputs, outputs) if width))


def adapter_backward(
    tape: Tape,
    kind: LinearKind,
    x: Value,
    taken: AdapterInput,
    inputs: int,
    outputs: int,
    scaled: Buffer,
    saved_input: Buffer | None,
    saved_down: Buffer | None,
    also: Buffer | None = None,
) -> None:
    """Backward of lora_B and lora_A from the gradient `scaled` of lora_B's output; takes `scaled` over.

    `also` is a gradient of the same input that is there already and takes this one in.
    """
    width = kind.adapter_compute_width
    weight_gradient(tape, kind, kind.rank * outputs, kind.adapter_width)
    if kind.frozen_down and not x.requires_grad:
        tape.free(scaled, saved_down, taken.mask)
        return
    down_grad = tape.tokens(kind.rank * width)
    tape.free(scaled, saved_down)
    if not kind.frozen_down:
        weight_gradient(tape, kind, kind.rank * inputs, kind.adapter_width)
    if not x.requires_grad:
        tape.free(down_grad, saved_input, taken.mask)
        return
    grad = tape.tokens(inputs * width)
    tape.free(down_grad, saved_input)
    if taken.narrow is not None:
        cast = tape.tokens(inputs * taken.width)
        tape.free(grad)
        grad = cast
    if also is not None:
        tape.free(also)
    input_backward(tape, x, taken, inputs, grad, view=taken.narrow is None)


def input_backward(
    tape: Tape, x: Value, taken: AdapterInput, inputs: int, grad: Buffer, *, view: bool
) -> None:
    """Backward of what adapter_input does; takes over `grad`."""
    if taken.mask is not None:
        masked = tape.tokens(inputs * taken.width)
        tape.free(grad, taken.mask)
        grad = masked
    if taken.wide is not None:
        narrow = tape.tokens(inputs * x.width)
        tape.free(grad)
        grad = narrow
    tape.add_grad(x, grad, view=view and taken.mask is None and taken.wide is None)
