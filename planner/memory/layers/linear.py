"""Linear layers on the tape: NF4 with an adapter, 16-bit with an adapter, trained in full, or frozen.

Sources: bitsandbytes autograd/_functions.py (MatMul4Bit), backends/cuda/ops.py (_dequant_linear_fallback),
nn/modules.py (Linear4bit.forward: casts to the compute dtype and back); PEFT tuners/lora/bnb.py and layer.py
(forward); order and sizes seen in allocation traces on an H100 (tests/stack/traces).
"""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.layers.base_weight import (
    LinearKind,
    base_backward,
    base_forward,
    reduced_gradient,
    weight_gradient,
)
from planner.memory.layers.dora import dora_linear
from planner.memory.layers.lora import adapted
from planner.memory.layers.miss import miss_linear
from planner.memory.layers.oft import oft_linear
from planner.memory.layers.vera import vera_linear
from planner.memory.tape.tape import Tape, Value


def linear(tape: Tape, kind: LinearKind, x: Value, inputs: int, outputs: int) -> Value:
    """Put on the tape one linear layer of `inputs` x `outputs` on `x`; returns its output, held once."""
    if kind.trained:
        return _trained(tape, kind, x, inputs, outputs)
    if kind.rank and kind.peft_type == "oft":
        return oft_linear(tape, kind, x, inputs, outputs)
    base = base_forward(tape, kind, x, inputs, outputs)
    if not kind.rank:
        if x.requires_grad:
            tape.nodes.append(
                lambda: base_backward(tape, kind, x, tape.take_grad(base), base.width, inputs, outputs)
            )
        return base
    if kind.quantized and kind.bits == 4:
        # PEFT clones what bitsandbytes returns (tuners/lora/bnb.py).
        clone = tape.tokens(outputs * base.width)
        tape.free(base.buffer)
        base.buffer = clone
    if kind.peft_type != "lora":
        of_type = {"vera": vera_linear, "miss": miss_linear}[kind.peft_type]
        return of_type(tape, kind, x, base, inputs, outputs)
    if kind.dora:
        return dora_linear(tape, kind, x, base, inputs, outputs)
    return adapted(tape, kind, x, base, inputs, outputs)


def early_gradients(kind: LinearKind, outputs: int, width: int) -> list[float]:
    """Bytes a token of what backward makes of the gradient of an output of `width` bytes an element before it
    asks for a saved tensor: the scaling by alpha / rank.
    """
    if not kind.rank or kind.peft_type in ("miss", "oft"):
        return []
    if kind.peft_type == "vera":
        return [] if width == FP32 else [outputs * FP32, outputs * width]
    if not kind.dora:
        return [outputs * kind.adapter_compute_width]
    # The product by alpha / rank. Before it, unless the base is quantised: the cast back to fp32, and the
    # base layer's part of that in its own dtype.
    wide = outputs * FP32
    return [wide] if width == FP32 else [wide, outputs * width, wide]


def _trained(tape: Tape, kind: LinearKind, x: Value, inputs: int, outputs: int) -> Value:
    # The input is saved before the product: recomputation that ends there never makes it.
    saved = tape.save(x.buffer)
    base = base_forward(tape, kind, x, inputs, outputs)
    result = Value(base.buffer, True, base.width)

    def backward() -> None:
        grad, x_grad = tape.take_grad(result), None
        # Gradients come in the order of the factors' names (torch's generated Functions.cpp): of a product
        # with a bias (addmm) the input is mat1, of one without (mm) the weight is mat2 and the input "self".
        if kind.biased and x.requires_grad:
            x_grad = tape.tokens(inputs * kind.compute_width)
        weight_gradient(tape, kind, inputs * outputs, kind.adapter_width)
        if not kind.biased and x.requires_grad:
            x_grad = tape.tokens(inputs * kind.compute_width)
        if kind.biased:
            reduced_gradient(tape, kind, outputs, given=(grad,), saved=saved)
        else:
            tape.free(saved, grad)
        if x_grad is not None:
            tape.add_grad(x, x_grad, view=True)

    tape.nodes.append(backward)
    return result
