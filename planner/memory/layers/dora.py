"""A linear layer with a DoRA adapter, on the tape.

PEFT folds the adapter into a weight of full size in every pass, from an identity matrix, to take the norm of
its rows; the magnitude vector stays in fp32 (TRL casts every other trained parameter to bf16), so the
layer's output is fp32. Sources: PEFT tuners/lora/dora.py and variants.py; allocation traces llama_dora,
llama_dora_drop, llama_dora_nock, llama_l_dora, phi3_dora.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.base.units import FP32
from planner.memory.layers.base_weight import (
    LinearKind,
    base_backward,
    sum_over_tokens,
    weight_gradient,
)
from planner.memory.layers.lora import AdapterInput, adapter_backward, adapter_input, read_input, weight_casts
from planner.memory.tape.tape import Buffer, Size, Tape, Value
from planner.models.storage import ABSMAX_WIDTH, QUANTIZATION_BLOCK


def dora_linear(tape: Tape, kind: LinearKind, x: Value, base: Value, inputs: int, outputs: int) -> Value:
    """Put on the tape what follows the base layer, `base`; takes over the hold on it."""
    width = kind.adapter_compute_width
    wide = FP32
    taken = adapter_input(tape, kind, x, inputs)
    *graph, adapter, weight = _folded_weight(tape, kind, taken.width, inputs, outputs)
    read = read_input(tape, kind, x, taken, inputs)
    saved_input = tape.save(read)
    casts = weight_casts(tape, kind, inputs if x.requires_grad else 0, outputs)
    down = tape.tokens(kind.rank * width)
    saved_down = tape.save(down)
    tape.free(read)
    up = tape.tokens(outputs * width)
    tape.free(down)
    second = _second_base(tape, kind, x, taken, weight, inputs, outputs) if kind.dropout else None
    saved_base = tape.save(base.buffer if second is None else second.output)
    from_base = tape.tokens(outputs * wide)
    saved_up = tape.save(up)
    product = tape.tokens(outputs * wide)
    scaled = tape.tokens(outputs * wide)
    tape.free(product)
    summed = tape.tokens(outputs * wide)
    tape.free(from_base, scaled, *graph, adapter, weight, up, second.output if second else None)
    result = Value(tape.tokens(outputs * wide), True, wide)
    tape.free(summed, base.buffer, taken.dropped)
    if not (kind.quantized and kind.autocast) and base.width != wide:
        # PEFT casts back to the dtype of the base layer's output (tuners/lora/layer.py, forward).
        narrow = tape.tokens(outputs * base.width)
        tape.free(result.buffer)
        result = Value(narrow, True, base.width)
    tape.free(taken.wide)

    saved = _Saved(
        input=saved_input,
        down=saved_down,
        base=saved_base,
        up=saved_up,
        casts=casts,
        taken=taken,
        second=second,
        base_width=base.width,
    )
    tape.nodes.append(lambda: _dora_backward(tape, kind, x, saved, result, inputs, outputs))
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Saved:
    """What DoRA's backward reads: the adapter's input and lora_A's product of it, the base layer's output,
    lora_B's product, copies of weights, and how the input was taken and the base layer applied again.
    """

    input: Buffer | None
    down: Buffer | None
    base: Buffer | None
    up: Buffer | None
    casts: tuple[Buffer, ...]
    taken: AdapterInput
    second: _SecondBase | None
    base_width: int


def _dora_backward(
    tape: Tape, kind: LinearKind, x: Value, saved: _Saved, result: Value, inputs: int, outputs: int
) -> None:
    """Backward of scaling and magnitude, then of the adapter and of the base layer."""
    width, wide = kind.adapter_compute_width, FP32
    base_width, second = saved.base_width, saved.second
    grad = tape.take_grad(result)
    if result.width != wide:
        cast = tape.tokens(outputs * wide)
        tape.free(grad)
        grad = cast
    # The base layer's part of the gradient is cast at once where it is narrower.
    to_output = tape.tokens(outputs * base_width) if result.width != wide else None
    to_product = tape.tokens(outputs * wide)
    to_up, to_magnitude = tape.tokens(outputs * wide), tape.tokens(outputs * wide)
    tape.free(saved.up)
    sum_over_tokens(tape, outputs, to_magnitude)
    up_grad = tape.tokens(outputs * width)
    tape.free(to_up, to_product)
    to_base, to_magnitude = tape.tokens(outputs * wide), tape.tokens(outputs * wide)
    tape.free(saved.base)
    sum_over_tokens(tape, outputs, to_magnitude)
    weight_gradient(tape, kind, outputs, FP32)
    also = None
    if second is not None:
        also = _second_backward(tape, kind, x, saved.taken, second, inputs, outputs, to_base)
        if to_output is not None:
            tape.free(grad)
        total = to_output or grad
    else:
        total = tape.tokens(outputs * base_width)
        tape.free(to_base, grad)
        if to_output is not None:
            tape.free(total)
            total = to_output
    adapter_backward(tape, kind, x, saved.taken, inputs, outputs, up_grad, saved.input, saved.down, also=also)
    tape.free(*saved.casts)
    if x.requires_grad:
        base_backward(tape, kind, x, total, base_width, inputs, outputs)
    else:
        tape.free(total)


@dataclass(slots=True)
class _SecondBase:
    """The base layer's product on the dropped-out input, and the weight that its backward reads."""

    output: Buffer
    weight: Buffer | None


def _second_base(
    tape: Tape,
    kind: LinearKind,
    x: Value,
    taken: AdapterInput,
    weight: Buffer | None,
    inputs: int,
    outputs: int,
) -> _SecondBase:
    """With dropout the base layer is applied once more, to what dropout has left; its weight is saved for
    that input's gradient alone.
    """
    compute = kind.compute_width
    casts = taken.width != compute
    read = tape.fixed(inputs * outputs * compute) if casts else weight
    saved = tape.save(read) if read is not None and x.requires_grad else None
    narrow = tape.tokens(inputs * compute) if casts else None
    output = tape.tokens(outputs * compute)
    tape.free(narrow, read if casts else None)
    return _SecondBase(output=output, weight=saved)


def _second_backward(
    tape: Tape,
    kind: LinearKind,
    x: Value,
    taken: AdapterInput,
    second: _SecondBase,
    inputs: int,
    outputs: int,
    to_base: Buffer,
) -> Buffer | None:
    """Backward of the second base product; returns the gradient of the dropped-out input."""
    narrow = tape.tokens(outputs * kind.compute_width)
    tape.free(to_base)
    if not x.requires_grad:
        tape.free(narrow, second.weight)
        return None
    grad = tape.tokens(inputs * kind.compute_width)
    tape.free(second.weight, narrow)
    if taken.width != kind.compute_width:
        cast = tape.tokens(inputs * taken.width)
        tape.free(grad)
        grad = cast
    return grad


def _folded_weight(
    tape: Tape, kind: LinearKind, width: int, inputs: int, outputs: int
) -> tuple[Buffer | None, ...]:
    """The norm of base weight + adapter; returns what lives until the module returns.

    `width` is that of the layer's input, to which both weights are cast. The graph of the folded adapter
    keeps the identity matrix and its product with lora_A for as long as the weight is held.
    """
    compute = kind.adapter_compute_width
    identity = tape.fixed(inputs * inputs * kind.adapter_width)
    kept_identity = None
    if kind.adapter_width != compute:
        kept_identity, identity = identity, tape.fixed(inputs * inputs * compute)
    through = tape.fixed(inputs * kind.rank * compute)
    graph: tuple[Buffer | None, ...] = (identity, through)
    if kept_identity is not None and not tape.saves:
        # Without a graph autocast's copy goes as lora_A's product returns; the matrix itself stays.
        tape.free(identity)
        graph = (through,)
    adapter = tape.fixed(inputs * outputs * compute)
    if not tape.saves:
        tape.free(*graph)
        graph = ()
    tape.free(kept_identity)
    if width != compute:
        cast = tape.fixed(inputs * outputs * width)
        tape.free(adapter)
        adapter = cast
    weight = None
    if kind.quantized:
        constants = (
            tape.fixed(inputs * outputs / QUANTIZATION_BLOCK * ABSMAX_WIDTH) if kind.double_quant else None
        )
        weight = tape.fixed(inputs * outputs * kind.weight_width)
        tape.free(constants)
    if width != kind.weight_width:
        cast = tape.fixed(inputs * outputs * width)
        tape.free(weight)
        weight = cast
    scaled = tape.allocate(Size(constant=inputs * outputs * width), 1)
    total = tape.fixed(inputs * outputs * width)
    tape.free(scaled, total)
    return (*graph, adapter, weight)
