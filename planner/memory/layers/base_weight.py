"""A linear layer's base weight: how it is held, its product both ways, a trained weight's gradient.

Sources: bitsandbytes autograd/_functions.py (MatMul4Bit), backends/cuda/ops.py (_dequant_linear_fallback),
nn/modules.py (Linear4bit.forward: casts to the compute dtype and back).
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.base.units import FP32
from planner.base.values import dataclass
from planner.memory.tape.tape import GRADIENTS, WORKSPACE, Buffer, Size, Tape, Value
from planner.models.storage import ABSMAX_WIDTH, EIGHT_BIT_MULTIPLE, QUANTIZATION_BLOCK

HALF = 2
"""Bytes of an element in float16, which bitsandbytes quantises inputs from."""
REDUCTION_WIDTH = 2 * FP32
"""Bytes an element of the global scratch buffer in which CUDA sums over tokens, one a feature (seen in traces
llama_f, qwen3_f and llama_dora, and for biases in an H200's allocations of whole runs of qwen2.5-1.5b)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearKind:
    """How one linear layer is held and trained.

    Where it is quantised it is so in `bits`. `rank` is 0 without an adapter. `compute_width` is the width of
    the elements that matrix products are computed in, `weight_width` that of the base weight (of the
    dequantised one, where it is quantised), `adapter_width` that of adapter weights. `autocast` says that
    torch casts the inputs of matrix products. `accumulating` says whether gradients of earlier micro-steps
    are already there, so that new ones are temporary. `sliced` says of a stack of experts that products with
    it dequantise a few experts at a time, `biased` that a bias is trained too. `eight_bit_*` say which pass
    computes the frozen weight's product in 8 bits. `frozen_down` says that lora_A is not trained. `peft_type`
    is TrainingSetup's: `rank` is then that of another kind of adapter.
    """

    quantized: bool
    trained: bool
    rank: int
    dropout: bool
    dora: bool
    double_quant: bool
    compute_width: int
    weight_width: int
    adapter_width: int
    autocast: bool
    accumulating: bool
    bits: int = 4
    sliced: bool = False
    biased: bool = False
    eight_bit_forward: bool = False
    eight_bit_backward: bool = False
    frozen_down: bool = False
    peft_type: str = "lora"

    def forward_in_8bit(self, inputs: int, outputs: int) -> bool:
        """Whether a forward product of such a weight is computed in 8 bits."""
        return self.eight_bit_forward and not (inputs % EIGHT_BIT_MULTIPLE or outputs % EIGHT_BIT_MULTIPLE)

    def backward_in_8bit(self, inputs: int, outputs: int) -> bool:
        """Whether the gradient of its input is."""
        return self.eight_bit_backward and not (inputs % EIGHT_BIT_MULTIPLE or outputs % EIGHT_BIT_MULTIPLE)

    @property
    def adapter_compute_width(self) -> int:
        """The width of the elements that the adapter's matrix products are computed in."""
        return self.compute_width if self.autocast else self.adapter_width


def base_forward(tape: Tape, kind: LinearKind, x: Value, inputs: int, outputs: int) -> Value:
    """The base layer's product; a quantised one returns it in the dtype of its input."""
    if kind.quantized and kind.bits == 8:
        return _eight_bit_forward(tape, x, inputs, outputs)
    narrow = tape.tokens(inputs * kind.compute_width) if x.width != kind.compute_width else None
    if not kind.quantized:
        result = tape.tokens(outputs * kind.compute_width)
        tape.product()
        tape.free(narrow)
        return Value(result, x.requires_grad, kind.compute_width)
    constants = inputs * outputs / QUANTIZATION_BLOCK * ABSMAX_WIDTH
    first = tape.fixed(constants) if kind.double_quant else None
    second = tape.fixed(constants) if kind.double_quant else None
    weight = tape.fixed(inputs * outputs * kind.weight_width)
    result = tape.tokens(outputs * kind.compute_width)
    tape.product()
    tape.free(second, first, weight)
    if narrow is not None:
        wide = tape.tokens(outputs * x.width)
        tape.free(result, narrow)
        result = wide
    return Value(result, x.requires_grad, x.width)


def _eight_bit_forward(tape: Tape, x: Value, inputs: int, outputs: int) -> Value:
    """bitsandbytes' product of weights in 8 bits: the input is cast to float16 and quantised a row at a time,
    the product of both is of 32 bits, and is scaled to float16, then cast. Columns of the input with outliers
    (above 6 in size) would add their own copies; a handful of thousands have them, and none is counted.

    Sources: bitsandbytes autograd/_functions.py (MatMul8bitLt.forward), backends/cuda/ops.py
    (int8_vectorwise_quant, int8_mm_dequant), backends/default/ops.py (int8_mixed_scaled_mm). It keeps the
    input beyond a checkpoint; the launcher lets it go (launcher/training/loading/eight_bits.py).
    """
    narrow = tape.tokens(inputs * HALF)
    scales = tape.tokens(FP32)
    quantised = tape.tokens(inputs)
    sizes = tape.tokens(inputs * HALF)
    outliers = tape.tokens(inputs)
    tape.free(sizes)
    tape.free(narrow, outliers)
    product = tape.tokens(outputs * FP32)
    tape.product()
    result = tape.tokens(outputs * HALF)
    cast = tape.tokens(outputs * x.width)
    tape.free(product, result, scales, quantised)
    return Value(cast, x.requires_grad, x.width)


def base_backward(
    tape: Tape, kind: LinearKind, x: Value, grad: Buffer, width: int, inputs: int, outputs: int
) -> None:
    """The base layer's backward pass from a gradient of that width."""
    if width != kind.compute_width:
        narrow = tape.tokens(outputs * kind.compute_width)
        tape.free(grad)
        grad = narrow
    if kind.quantized:
        nested = kind.double_quant and kind.bits == 4
        constants = tape.fixed(inputs * outputs / QUANTIZATION_BLOCK * ABSMAX_WIDTH) if nested else None
        weight = tape.fixed(inputs * outputs * kind.weight_width)
        tape.free(constants)
        x_grad = tape.tokens(inputs * kind.compute_width)
        tape.free(weight)
    else:
        x_grad = tape.tokens(inputs * kind.compute_width)
    tape.free(grad)
    cast = x.width != kind.compute_width
    if cast:
        wide = tape.tokens(inputs * x.width)
        tape.free(x_grad)
        x_grad = wide
    tape.add_grad(x, x_grad, view=not cast)


def weight_gradient(tape: Tape, kind: LinearKind, elements: int, element_width: int) -> None:
    """A trainable weight's gradient: kept until the optimizer step, or added to the one already there."""
    if kind.accumulating:
        tape.free(tape.allocate(Size(constant=elements * element_width), WORKSPACE))
    else:
        tape.allocate(Size(constant=elements * element_width), GRADIENTS)


def sum_over_tokens(tape: Tape, features: int, *given: Buffer | None) -> None:
    """A sum over tokens, one a feature: its scratch buffer, and what ends with it."""
    tape.free(tape.tokens(features * REDUCTION_WIDTH), *given)


def reduced_gradient(
    tape: Tape, kind: LinearKind, elements: int, *, given: Sequence[Buffer | None], saved: Buffer | None
) -> None:
    """A trained vector's gradient, which the engine sums over tokens before the node lets go of the gradients
    that are `given`, and of what it has `saved`, unless a checkpoint handed that out: then it goes as the
    node's own function returns (torch/csrc/autograd/engine.cpp, call_function; utils/checkpoint.py,
    unpack_hook).
    """
    if tape.recomputes:
        tape.free(saved)
    sum_over_tokens(tape, elements, *given)
    if not tape.recomputes:
        tape.free(saved)
    weight_gradient(tape, kind, elements, kind.adapter_width)
