"""A mixture-of-experts block on the tape, as transformers runs it with grouped matrix products.

Experts are 3-D parameters that bitsandbytes leaves in 16 bits. PEFT's "all-linear" adapts them through
parametrisation: each pass folds the adapter into a full copy of the experts' weights, which backward keeps.
Held in 4 bits by the launcher, a stack is dequantised whole where it is read, and lives as that copy does; or
a few experts at a time within each product, in both passes (launcher/training/products/sliced_experts.py).
Sources: transformers integrations/moe.py (grouped_mm_experts_forward), PEFT tuners/lora/layer.py
(ParamWrapper, _LoraFactorsProxy), bitsandbytes nn/parametrize.py; allocation trace moe_q.
"""

from __future__ import annotations

from planner.base.units import FP32, INT64
from planner.base.values import dataclass
from planner.memory.layers.base_weight import LinearKind, weight_gradient
from planner.memory.tape.tape import Buffer, Tape, Value
from planner.models.spec import LayerSpec
from planner.models.storage import ABSMAX_WIDTH, QUANTIZATION_BLOCK, expert_slices


def experts(tape: Tape, layer: LayerSpec, kind: LinearKind, x: Value, *, router: LinearKind) -> Value:
    """Put on the tape routing and experts of one layer; `kind` is that of the experts' tensors."""
    width = kind.compute_width
    routed = layer.experts_per_token
    inner = layer.expert_intermediate_size
    hidden = layer.hidden_size
    gate_up_elements = layer.experts * 2 * inner * hidden
    down_elements = layer.experts * inner * hidden
    adapted = kind.rank > 0
    for elements in (down_elements, gate_up_elements):
        register_stack(tape, kind, elements)
    saved_router = _router(tape, layer, router, x)
    probabilities = tape.tokens(layer.experts * FP32)
    # Without an adapter in attention the first layer's experts get an input that wants no gradient.
    scores_want = x.requires_grad or bool(saved_router)
    saved_probabilities = tape.save(probabilities)
    tape.free(probabilities)
    order = tape.tokens(routed * INT64)
    gathered = tape.tokens(routed * hidden * width)
    gate_up_weight = read_stack(tape, kind, gate_up_elements)
    fused = tape.tokens(routed * 2 * inner * width)
    multiply_sliced(tape, kind, layer.experts, gate_up_elements)
    saved_gathered = tape.save(gathered) if adapted or kind.trained else None
    saved_gate_up_weight = tape.save(gate_up_weight) if gate_up_weight and x.requires_grad else None
    activated = tape.tokens(routed * inner * width)
    product = tape.tokens(routed * inner * width)
    saved_fused, saved_activated = tape.save(fused), tape.save(activated)
    saved_product = tape.save(product) if adapted or kind.trained else None
    tape.free(fused, activated)
    down_weight = read_stack(tape, kind, down_elements)
    saved_down_weight = tape.save(down_weight) if down_weight and (adapted or x.requires_grad) else None
    outputs = tape.tokens(routed * hidden * width)
    multiply_sliced(tape, kind, layer.experts, down_elements)
    tape.free(product)
    saved_outputs = tape.save(outputs) if scores_want else None
    saved_order, result, summed = _weighted_sum(tape, layer, width, order)
    # What was made of the weights is cached for the whole block (PEFT tuners/lora/layer.py:
    # parametrize.cached; bitsandbytes nn/parametrize.py: its hooks).
    tape.free(*summed, outputs, gathered, gate_up_weight, down_weight, order)

    saved = _Saved(
        router=saved_router,
        probabilities=saved_probabilities,
        gathered=saved_gathered,
        gate_up_weight=saved_gate_up_weight,
        fused=saved_fused,
        activated=saved_activated,
        product=saved_product,
        down_weight=saved_down_weight,
        outputs=saved_outputs,
        order=saved_order,
        scores_want=scores_want,
    )
    tape.nodes.append(lambda: _experts_backward(tape, layer, kind, x, router, saved, result))
    return result


def _weighted_sum(
    tape: Tape, layer: LayerSpec, width: int, order: Buffer
) -> tuple[Buffer | None, Value, tuple[Buffer | None, ...]]:
    """Weight what experts return, put it in the tokens' order and sum it up: what is saved of the order, the
    result, and what is let go when the block returns.
    """
    routed, hidden = layer.experts_per_token, layer.hidden_size
    wide = routing_width(layer, width)
    weighted = tape.tokens(routed * hidden * wide)
    # Indexing keeps its indices: the last that is kept, so that recomputation comes this far.
    saved_order = tape.save(order)
    reordered = tape.tokens(routed * hidden * wide)
    tape.free(weighted)
    summed = tape.tokens(hidden * FP32) if width != FP32 else None
    return saved_order, Value(tape.tokens(hidden * width), True, width), (summed, reordered)


def routing_width(layer: LayerSpec, width: int) -> int:
    """Bytes of an element of what experts return once it is weighted, and of its gradient."""
    return FP32 if layer.fp32_routing else width


def register_stack(tape: Tape, kind: LinearKind, elements: int) -> None:
    """What PEFT's wrapper of a stack does before its module begins: torch.nn.utils.parametrize evaluates each
    parametrisation once when it is registered.
    """
    if kind.rank and not kind.quantized:
        tape.free(tape.fixed(elements * kind.compute_width))


def read_stack(tape: Tape, kind: LinearKind, elements: int) -> Buffer | None:
    """What is made of a stack where it is read, null where nothing is: dequantised, and with an
    adapter the sum of that and of its product (torch.baddbmm), in which nothing else is kept.
    """
    if kind.sliced or not (kind.quantized or kind.rank):
        return None
    if not kind.quantized:
        return tape.fixed(elements * kind.compute_width)
    constants = tape.fixed(elements / QUANTIZATION_BLOCK * ABSMAX_WIDTH) if kind.double_quant else None
    dequantised = tape.fixed(elements * kind.weight_width)
    tape.free(constants)
    if not kind.rank:
        return dequantised
    folded = tape.fixed(elements * kind.compute_width)
    tape.free(dequantised)
    return folded


def multiply_sliced(tape: Tape, kind: LinearKind, experts: int, elements: int) -> None:
    """What a product with a stack of so many `elements` has beside its result where it dequantises a few
    experts at a time: the constants of all, and one slice after the other.
    """
    if not kind.sliced:
        return
    constants = tape.fixed(elements / QUANTIZATION_BLOCK * ABSMAX_WIDTH) if kind.double_quant else None
    each = elements // experts
    for count in expert_slices(experts, each, kind.weight_width):
        tape.free(tape.fixed(count * each * kind.weight_width))
    tape.free(constants)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Saved:
    """What the experts' backward reads, in the order of the forward pass; null where nothing asks for it.
    `scores_want` says that something asks for the gradient of the router's scores.
    """

    router: tuple[Buffer | None, ...]
    probabilities: Buffer | None
    gathered: Buffer | None
    gate_up_weight: Buffer | None
    fused: Buffer | None
    activated: Buffer | None
    product: Buffer | None
    down_weight: Buffer | None
    outputs: Buffer | None
    order: Buffer | None
    scores_want: bool


def _experts_backward(
    tape: Tape, layer: LayerSpec, kind: LinearKind, x: Value, router: LinearKind, saved: _Saved, result: Value
) -> None:
    """Backward of the weighted sum, of both products and of the activation between them, then of routing."""
    width, routed = kind.compute_width, layer.experts_per_token
    inner, hidden = layer.expert_intermediate_size, layer.hidden_size
    grad = tape.take_grad(result)
    wide = routing_width(layer, width)
    expanded = tape.tokens(routed * hidden * wide)
    tape.free(grad, saved.order)
    to_weights = tape.tokens(routed * hidden * wide) if saved.scores_want else None
    to_outputs = tape.tokens(routed * hidden * wide)
    tape.free(saved.outputs)
    if wide != width:
        narrow = tape.tokens(routed * hidden * width)
        tape.free(to_outputs)
        to_outputs = narrow
    tape.free(to_weights, expanded, saved.probabilities)
    down_grad = _weight_grad(tape, kind, layer.experts * inner * hidden)
    product_grad = tape.tokens(routed * inner * width)
    multiply_sliced(tape, kind, layer.experts, layer.experts * inner * hidden)
    tape.free(saved.product, saved.down_weight, to_outputs)
    _adapter_grads(tape, layer, kind, kind.rank * (hidden + inner))
    tape.free(down_grad)
    activated_grad = tape.tokens(routed * inner * width)
    up_grad = tape.tokens(routed * inner * width)
    tape.free(saved.activated, product_grad)
    gate_grad = tape.tokens(routed * inner * width)
    tape.free(saved.fused, activated_grad)
    fused_grad = tape.tokens(routed * 2 * inner * width)
    tape.free(gate_grad, up_grad)
    gate_up_grad = _weight_grad(tape, kind, layer.experts * 2 * inner * hidden)
    gathered_grad = tape.tokens(routed * hidden * width) if x.requires_grad else None
    if gathered_grad is not None:
        multiply_sliced(tape, kind, layer.experts, layer.experts * 2 * inner * hidden)
    tape.free(saved.gathered, saved.gate_up_weight, fused_grad)
    _adapter_grads(tape, layer, kind, 2 * kind.rank * (hidden + 2 * inner))
    tape.free(gate_up_grad)
    if gathered_grad is not None:
        x_grad = tape.tokens(hidden * width)
        tape.free(gathered_grad)
        tape.add_grad(x, x_grad)
    if saved.scores_want:
        _router_backward(tape, layer, router, x, saved.router)


def _weight_grad(tape: Tape, kind: LinearKind, elements: int) -> Buffer | None:
    """Gradient of the folded weights (freed once the adapter has its own), or of trained experts (kept)."""
    if kind.rank:
        return tape.fixed(elements * kind.compute_width)
    if kind.trained:
        weight_gradient(tape, kind, elements, kind.adapter_width)
    return None


def _adapter_grads(tape: Tape, layer: LayerSpec, kind: LinearKind, widths: int) -> None:
    """Gradients of the experts' adapters, `widths` elements an expert; the fused tensor's rank is doubled."""
    if kind.rank:
        weight_gradient(tape, kind, layer.experts * widths, kind.adapter_width)


def _router(tape: Tape, layer: LayerSpec, kind: LinearKind, x: Value) -> tuple[Buffer | None, ...]:
    """An adapted or trained router needs its input in backward; its folded weight is kept too."""
    if not (kind.rank or kind.trained):
        return ()
    saved_input = tape.save(x.buffer)
    if not kind.rank:
        return (saved_input,)
    folded = tape.fixed(layer.experts * layer.hidden_size * kind.compute_width)
    saved = (saved_input, tape.save(folded))
    tape.free(folded)
    return saved


def _router_backward(
    tape: Tape, layer: LayerSpec, kind: LinearKind, x: Value, saved: tuple[Buffer | None, ...]
) -> None:
    logits_grad = tape.tokens(layer.experts * kind.compute_width)
    elements = layer.experts * layer.hidden_size
    folded_grad = tape.fixed(elements * kind.compute_width) if kind.rank else None
    if kind.trained:
        weight_gradient(tape, kind, elements, kind.adapter_width)
    x_grad = tape.tokens(layer.hidden_size * kind.compute_width) if x.requires_grad else None
    tape.free(logits_grad, *saved)
    if kind.rank:
        adapter = kind.rank * (layer.experts + layer.hidden_size)
        weight_gradient(tape, kind, adapter, kind.adapter_width)
    tape.free(folded_grad)
    if x_grad is not None:
        tape.add_grad(x, x_grad, view=True)
