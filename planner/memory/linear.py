"""Replay of linear layers: NF4 with an adapter, 16-bit with an adapter, trained in full, or frozen.

Sources: bitsandbytes autograd/_functions.py (MatMul4Bit), backends/cuda/ops.py (_dequant_linear_fallback),
nn/modules.py (Linear4bit.forward: casts to the compute dtype and back); PEFT tuners/lora/bnb.py and layer.py
(forward); order and sizes seen in allocation traces on an H100 (tests/stack/traces).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.memory.tape import GRADIENTS, WORKSPACE, Buffer, Size, Tape, Value

NF4_BLOCK = 64
ABSMAX_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearKind:
    """How one linear layer is held and trained.

    `rank` is 0 without an adapter. `compute_bytes` is the width of the elements that matrix products are
    computed in, `weight_bytes` that of the base weight (of the dequantised one, where it is quantised),
    `adapter_bytes` that of adapter weights. `autocast` says that torch casts the inputs of matrix products.
    `accumulating` says whether gradients of earlier micro-steps are already there, so that new ones are
    temporary.
    """

    quantized: bool
    trained: bool
    rank: int
    dropout: bool
    dora: bool
    double_quant: bool
    compute_bytes: int
    weight_bytes: int
    adapter_bytes: int
    autocast: bool
    accumulating: bool

    @property
    def adapter_compute_bytes(self) -> int:
        """The width of the elements that the adapter's matrix products are computed in."""
        return self.compute_bytes if self.autocast else self.adapter_bytes


def linear(tape: Tape, kind: LinearKind, x: Value, inputs: int, outputs: int) -> Value:
    """Replay one linear layer of `inputs` x `outputs` on `x`; returns its output, held once."""
    if kind.trained:
        return _trained(tape, kind, x, inputs, outputs)
    base = _base_forward(tape, kind, x, inputs, outputs)
    if not kind.rank:
        if x.requires_grad:
            tape.nodes.append(
                lambda: base_backward(tape, kind, x, tape.take_grad(base), base.width, inputs, outputs)
            )
        return base
    if kind.quantized:
        # PEFT clones what bitsandbytes returns (tuners/lora/bnb.py).
        clone = tape.tokens(outputs * base.width)
        tape.free(base.buffer)
        base.buffer = clone
    if kind.dora:
        from planner.memory.dora import dora_linear

        return dora_linear(tape, kind, x, base, inputs, outputs)
    return _adapted(tape, kind, x, base, inputs, outputs)


def _base_forward(tape: Tape, kind: LinearKind, x: Value, inputs: int, outputs: int) -> Value:
    """The base layer's product; a quantised one returns it in the dtype of its input."""
    narrow = tape.tokens(inputs * kind.compute_bytes) if x.width != kind.compute_bytes else None
    if not kind.quantized:
        result = tape.tokens(outputs * kind.compute_bytes)
        tape.product()
        tape.free(narrow)
        return Value(result, x.requires_grad, kind.compute_bytes)
    constants = inputs * outputs / NF4_BLOCK * ABSMAX_BYTES
    first = tape.fixed(constants) if kind.double_quant else None
    second = tape.fixed(constants) if kind.double_quant else None
    weight = tape.fixed(inputs * outputs * kind.weight_bytes)
    result = tape.tokens(outputs * kind.compute_bytes)
    tape.product()
    tape.free(second, first, weight)
    if narrow is not None:
        wide = tape.tokens(outputs * x.width)
        tape.free(result, narrow)
        result = wide
    return Value(result, x.requires_grad, x.width)


def base_backward(
    tape: Tape, kind: LinearKind, x: Value, grad: Buffer, width: int, inputs: int, outputs: int
) -> None:
    """The base layer's backward pass from a gradient of that width."""
    if width != kind.compute_bytes:
        narrow = tape.tokens(outputs * kind.compute_bytes)
        tape.free(grad)
        grad = narrow
    if kind.quantized:
        constants = tape.fixed(inputs * outputs / NF4_BLOCK * ABSMAX_BYTES) if kind.double_quant else None
        weight = tape.fixed(inputs * outputs * kind.weight_bytes)
        tape.free(constants)
        x_grad = tape.tokens(inputs * kind.compute_bytes)
        tape.free(weight)
    else:
        x_grad = tape.tokens(inputs * kind.compute_bytes)
    tape.free(grad)
    cast = x.width != kind.compute_bytes
    if cast:
        wide = tape.tokens(inputs * x.width)
        tape.free(x_grad)
        x_grad = wide
    tape.add_grad(x, x_grad, view=not cast)


def _adapted(tape: Tape, kind: LinearKind, x: Value, base: Value, inputs: int, outputs: int) -> Value:
    width = kind.adapter_compute_bytes
    taken = adapter_input(tape, kind, x, inputs)
    read = read_input(tape, kind, x, taken, inputs)
    saved_input = tape.save(read)
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
    casts = kind.adapter_bytes != x.width and not (kind.quantized and kind.autocast)
    width = kind.adapter_bytes if casts else x.width
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
    if taken.width != kind.adapter_compute_bytes:
        taken.narrow = tape.tokens(inputs * kind.adapter_compute_bytes)
        return taken.narrow
    buffer = taken.dropped or taken.wide or x.buffer
    buffer.holders += 1
    return buffer


def weight_casts(tape: Tape, kind: LinearKind, inputs: int, outputs: int) -> tuple[Buffer, ...]:
    """Copies of fp32 adapter weights in the compute dtype: autocast keeps them until backward is done.

    `inputs` is 0 where the input wants no gradient: backward does not need lora_A's copy then.
    """
    if kind.adapter_bytes <= kind.adapter_compute_bytes:
        return ()
    copy = kind.rank * kind.compute_bytes
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
    width = kind.adapter_compute_bytes
    weight_gradient(tape, kind, kind.rank * outputs, kind.adapter_bytes)
    down_grad = tape.tokens(kind.rank * width)
    tape.free(scaled, saved_down)
    weight_gradient(tape, kind, kind.rank * inputs, kind.adapter_bytes)
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


def _trained(tape: Tape, kind: LinearKind, x: Value, inputs: int, outputs: int) -> Value:
    # The input is saved before the product: recomputation that ends there never makes it.
    saved = tape.save(x.buffer)
    base = _base_forward(tape, kind, x, inputs, outputs)
    result = Value(base.buffer, True, base.width)

    def backward() -> None:
        grad = tape.take_grad(result)
        weight_gradient(tape, kind, inputs * outputs, kind.adapter_bytes)
        x_grad = tape.tokens(inputs * kind.compute_bytes) if x.requires_grad else None
        tape.free(grad, saved)
        if x_grad is not None:
            tape.add_grad(x, x_grad, view=True)

    tape.nodes.append(backward)
    return result


def weight_gradient(tape: Tape, kind: LinearKind, elements: int, element_bytes: int) -> None:
    """A trainable weight's gradient: kept until the optimizer step, or added to the one already there."""
    if kind.accumulating:
        tape.free(tape.allocate(Size(constant=elements * element_bytes), WORKSPACE))
    else:
        tape.allocate(Size(constant=elements * element_bytes), GRADIENTS)
