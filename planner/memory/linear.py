"""Replay of linear layers: NF4 with an adapter, 16-bit with an adapter, trained in full, or frozen.

Sources: bitsandbytes autograd/_functions.py (MatMul4Bit), backends/cuda/ops.py (_dequant_linear_fallback);
PEFT tuners/lora/bnb.py and layer.py (forward); order and sizes seen in allocation traces on an H100
(tests/stack/traces).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.memory.tape import GRADIENTS, WORKSPACE, Buffer, Size, Tape, Value

NF4_BLOCK = 64
ABSMAX_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearKind:
    """How one linear layer is held and trained.

    `rank` is 0 without an adapter. `activation_bytes` is the width of the stream's elements,
    `adapter_bytes` that of adapter weights. `accumulating` says whether gradients of earlier micro-steps
    are already there, so that new ones are temporary.
    """

    quantized: bool
    trained: bool
    rank: int
    dropout: bool
    double_quant: bool
    activation_bytes: int
    adapter_bytes: int
    accumulating: bool


def linear(tape: Tape, kind: LinearKind, x: Value, inputs: int, outputs: int) -> Value:
    """Replay one linear layer of `inputs` x `outputs` on `x`; returns its output, held once."""
    width = kind.activation_bytes
    base_result = _base_forward(tape, kind, inputs, outputs)
    if kind.trained:
        return _trained(tape, kind, x, base_result, inputs, outputs)
    if not kind.rank:
        result = Value(base_result, x.requires_grad)
        if x.requires_grad:
            tape.nodes.append(lambda: _base_backward(tape, kind, x, tape.take_grad(result), inputs, outputs))
        return result
    base = base_result
    if kind.quantized:
        base = tape.tokens(outputs * width)
        tape.free(base_result)
    adapter_input, mask, wide, dropped = _adapter_input(tape, kind, x, inputs)
    saved_input = tape.save(adapter_input)
    casts = _weight_casts(tape, kind, inputs if x.requires_grad else 0, outputs)
    down = tape.tokens(kind.rank * width)
    tape.free(adapter_input, dropped)
    saved_down = tape.save(down)
    up = tape.tokens(outputs * width)
    tape.free(down)
    scaled = tape.tokens(outputs * width)
    tape.free(up)
    result = Value(tape.tokens(outputs * width), True)
    tape.free(scaled, base, wide)

    def backward() -> None:
        grad = tape.take_grad(result)
        _adapter_backward(tape, kind, x, inputs, outputs, saved_input, mask, saved_down)
        tape.free(*casts)
        if x.requires_grad:
            _base_backward(tape, kind, x, grad, inputs, outputs)
        else:
            tape.free(grad)

    tape.nodes.append(backward)
    return result


def _weight_casts(tape: Tape, kind: LinearKind, inputs: int, outputs: int) -> tuple[Buffer, ...]:
    """Copies of fp32 adapter weights in the compute dtype: autocast keeps them until backward is done.

    `inputs` is 0 where the input wants no gradient: backward does not need lora_A's copy then.
    """
    if kind.adapter_bytes <= kind.activation_bytes:
        return ()
    copy = kind.rank * kind.activation_bytes
    return tape.cast_weights(*(copy * width for width in (inputs, outputs) if width))


def _base_forward(tape: Tape, kind: LinearKind, inputs: int, outputs: int) -> Buffer:
    if not kind.quantized:
        return tape.tokens(outputs * kind.activation_bytes)
    constants = inputs * outputs / NF4_BLOCK * ABSMAX_BYTES
    first = tape.fixed(constants) if kind.double_quant else None
    second = tape.fixed(constants) if kind.double_quant else None
    weight = tape.fixed(inputs * outputs * kind.activation_bytes)
    result = tape.tokens(outputs * kind.activation_bytes)
    tape.free(second, first, weight)
    return result


def _base_backward(tape: Tape, kind: LinearKind, x: Value, grad: Buffer, inputs: int, outputs: int) -> None:
    if kind.quantized:
        constants = tape.fixed(inputs * outputs / NF4_BLOCK * ABSMAX_BYTES) if kind.double_quant else None
        weight = tape.fixed(inputs * outputs * kind.activation_bytes)
        tape.free(constants)
        x_grad = tape.tokens(inputs * kind.activation_bytes)
        tape.free(weight)
    else:
        x_grad = tape.tokens(inputs * kind.activation_bytes)
    tape.free(grad)
    tape.add_grad(x, x_grad, view=True)


def _adapter_input(
    tape: Tape, kind: LinearKind, x: Value, inputs: int
) -> tuple[Buffer, Buffer | None, Buffer | None, Buffer | None]:
    """Input of lora_A, the dropout mask if backward needs it, the fp32 input and what dropout makes of it.

    PEFT casts the input to the adapter's dtype and autocast casts it back, unless the base is NF4; the fp32
    input lives until the module returns, dropout's output until lora_A does (tuners/lora/layer.py, forward).
    """
    width = kind.activation_bytes
    casts = kind.adapter_bytes != width and not kind.quantized
    wide = tape.tokens(inputs * kind.adapter_bytes) if casts else None
    if not kind.dropout:
        if casts:
            return tape.tokens(inputs * width), None, wide, None
        x.buffer.holders += 1
        return x.buffer, None, None, None
    mask: Buffer | None = tape.tokens(inputs)
    dropped = tape.tokens(inputs * (kind.adapter_bytes if casts else width))
    if not (tape.saves and x.requires_grad):
        tape.free(mask)
        mask = None
    if not casts:
        return dropped, mask, None, None
    return tape.tokens(inputs * width), mask, wide, dropped


def _adapter_backward(
    tape: Tape,
    kind: LinearKind,
    x: Value,
    inputs: int,
    outputs: int,
    saved_input: Buffer | None,
    saved_mask: Buffer | None,
    saved_down: Buffer | None,
) -> None:
    width = kind.activation_bytes
    scaled = tape.tokens(outputs * width)
    weight_gradient(tape, kind, kind.rank * outputs, kind.adapter_bytes)
    down_grad = tape.tokens(kind.rank * width)
    tape.free(scaled, saved_down)
    weight_gradient(tape, kind, kind.rank * inputs, kind.adapter_bytes)
    if not x.requires_grad:
        tape.free(down_grad, saved_input, saved_mask)
        return
    grad = tape.tokens(inputs * width)
    tape.free(down_grad, saved_input)
    casts = kind.adapter_bytes != width and not kind.quantized
    if casts:
        wide = tape.tokens(inputs * kind.adapter_bytes)
        tape.free(grad)
        grad = wide
    if saved_mask is not None:
        masked = tape.tokens(inputs * (kind.adapter_bytes if casts else width))
        tape.free(grad, saved_mask)
        grad = masked
    if casts:
        narrow = tape.tokens(inputs * width)
        tape.free(grad)
        grad = narrow
    tape.add_grad(x, grad, view=not casts and saved_mask is None)


def _trained(tape: Tape, kind: LinearKind, x: Value, base: Buffer, inputs: int, outputs: int) -> Value:
    result = Value(base, True)
    saved = tape.save(x.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        weight_gradient(tape, kind, inputs * outputs, kind.adapter_bytes)
        x_grad = tape.tokens(inputs * kind.activation_bytes) if x.requires_grad else None
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
