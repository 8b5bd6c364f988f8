"""Replay of self-attention: projections, rotary embedding, and the kernels transformers can call.

Sources: transformers models/*/modeling_*.py, integrations/sdpa_attention.py; allocation traces of real steps
on an H100 (tests/stack/traces).
"""

from __future__ import annotations

from dataclasses import replace

from planner.memory.elementwise import cast, copy, hold, split
from planner.memory.layer_knobs import FP32, LayerKnobs
from planner.memory.linear import linear
from planner.memory.norms import norm
from planner.memory.tape import Buffer, Size, Tape, Value
from planner.model_spec import LayerSpec


def attention(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value) -> Value:
    """The attention block from normed input to the output projection's result, held once."""
    query_size, kv_size = layer.query_size, layer.key_value_size
    if layer.fused_qkv:
        fused = linear(tape, knobs.kind("qkv_proj"), x, layer.hidden_size, query_size + 2 * kv_size)
        query, key, value = split(tape, fused, (query_size, kv_size, kv_size))
        tape.free(fused.buffer)
    else:
        query = linear(tape, knobs.kind("q_proj"), x, layer.hidden_size, query_size)
        query = _qk_norm(tape, layer, knobs, query, query_size)
        key = linear(tape, knobs.kind("k_proj"), x, layer.hidden_size, kv_size)
        key = _qk_norm(tape, layer, knobs, key, kv_size)
        value = linear(tape, knobs.kind("v_proj"), x, layer.hidden_size, kv_size)
    if knobs.liger:
        # Liger's kernel rotates in place, forward and backward; views of a fused projection are copied first.
        layer = replace(layer, rotary_concatenated=False)
        if layer.fused_qkv:
            query, key = copy(tape, query, query_size), copy(tape, key, kv_size)
    elif layer.rotary:
        rotated_query = _rotary(tape, layer, query, query_size * query.width)
        rotated_key = _rotary(tape, layer, key, kv_size * key.width)
        tape.free(query.buffer, key.buffer)
        query, key = rotated_query, rotated_key
    width = knobs.default.compute_bytes
    sizes = (kv_size, kv_size, query_size)
    inputs = [cast(tape, part, size, width) for part, size in zip((key, value, query), sizes, strict=True)]
    context = KERNELS[knobs.attention](tape, layer, inputs[2], inputs[0], inputs[1], width)
    tape.free(*(part.buffer for part in inputs))
    output = linear(tape, knobs.kind("o_proj"), context, query_size, layer.hidden_size)
    tape.free(context.buffer, query.buffer, key.buffer, value.buffer)
    return output


def _qk_norm(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value, size: int) -> Value:
    if layer.qk_norm == "none":
        return x
    groups = size // layer.head_dim if layer.qk_norm == "head" else 1
    if layer.qk_norm == "full":
        # Liger leaves OLMo 2's norms over all heads as they are (transformers/monkey_patch.py).
        knobs = replace(knobs, liger=False)
    normed = norm(tape, layer, knobs, x, size, groups=groups)
    tape.free(x.buffer)
    return normed


def _rotary(tape: Tape, layer: LayerSpec, x: Value, whole: float) -> Value:
    """Rotary embedding of the first `rotary_dim` features of each head; `whole` is bytes a token."""
    size = whole * (layer.rotary_dim or layer.head_dim) / layer.head_dim
    cosine = tape.tokens(size)
    half = tape.tokens(size / 2)
    turned = tape.tokens(size)
    tape.free(half)
    sine = tape.tokens(size)
    tape.free(turned)
    rotated = tape.tokens(size)
    tape.free(cosine, sine)
    if layer.rotary_concatenated:
        joined = tape.tokens(whole)
        tape.free(rotated)
        rotated = joined
    result = Value(rotated, x.requires_grad, x.width)

    def backward() -> None:
        grad = tape.take_grad(result)
        sine_grad = tape.tokens(size)
        half_grad = tape.tokens(size / 2)
        padded = tape.tokens(size)
        tape.free(half_grad)
        other = tape.tokens(size)
        tape.free(sine_grad, other)
        cosine_grad = tape.tokens(size)
        tape.free(grad, cosine_grad)
        if layer.rotary_concatenated:
            joined = tape.tokens(whole)
            tape.free(padded)
            padded = joined
        tape.add_grad(x, padded)

    if x.requires_grad:
        tape.nodes.append(backward)
    return result


def _transposed(tape: Tape, buffer: Buffer, size: float) -> Buffer:
    """A copy with heads and positions swapped; takes over the hold on the original."""
    copied = tape.tokens(size)
    tape.free(buffer)
    return copied


def _sum_heads(tape: Tape, grads: list[Buffer], indices: tuple[int, ...], size: float) -> None:
    """Sum gradients of repeated keys or values over the heads that share them, in that order."""
    for index in indices:
        summed = tape.tokens(size)
        tape.free(grads[index])
        grads[index] = summed


def _hand_back(tape: Tape, targets: tuple[Value, ...], grads: list[Buffer]) -> None:
    for target, grad in zip(targets, grads, strict=True):
        tape.add_grad(target, grad)


def _fused_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """Flash attention in torch's sdpa, without a mask: output and log-sum-exp are saved.

    Backward takes a workspace: the fp32 gradient of queries and one fp32 sum a head and, where query heads
    share keys, the 16-bit gradients of keys and values expanded to all heads.
    """
    heads = layer.num_attention_heads
    workspace = 2 * FP32 if layer.num_key_value_heads != heads else FP32
    context = tape.tokens(layer.query_size * width)
    statistics = tape.tokens(heads * FP32)
    tape.select(context, statistics)
    saved = [tape.save(buffer) for buffer in (query.buffer, key.buffer, value.buffer, context, statistics)]
    tape.free(statistics)
    if layer.rotary_concatenated:
        # torch.cat lays queries out head first, attention follows, and transposing back is a copy.
        context = _transposed(tape, context, layer.query_size * width)
    result = Value(context, query.requires_grad, width)

    def backward() -> None:
        grad = tape.take_grad(result)
        grads = [tape.tokens(layer.query_size * width)]
        grads += [tape.tokens(layer.key_value_size * width) for _ in range(2)]
        tape.free(tape.tokens(heads * (workspace * layer.head_dim + FP32)))
        tape.free(*saved, grad)
        _hand_back(tape, (query, key, value), grads)

    if query.requires_grad:
        tape.nodes.append(backward)
    return result


def _masked_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """torch's sdpa with a mask: keys and values repeated to all heads, the mask made additive in 16 bits."""
    heads = layer.num_attention_heads
    whole = layer.query_size * width
    # A single key head is repeated by a view (sdpa_attention.py, repeat_kv: reshape of an expanded tensor).
    shared = heads != layer.num_key_value_heads
    repeats = shared and layer.num_key_value_heads > 1
    repeated = [tape.tokens(whole) if repeats else hold(v.buffer) for v in (key, value)]
    additive = tape.allocate(Size(per_score=width))
    result = Value(tape.tokens(whole), query.requires_grad, width)
    statistics = tape.tokens(heads * FP32)
    tape.select(result.buffer, statistics)
    saved = [tape.save(b) for b in (query.buffer, *repeated, additive, result.buffer, statistics)]
    tape.free(*repeated, additive, statistics)
    if layer.rotary_concatenated:
        # As without a mask: the output follows the queries' order (padded phi-4 among the records).
        result.buffer = _transposed(tape, result.buffer, whole)

    def backward() -> None:
        grad = tape.take_grad(result)
        grads = [tape.tokens(whole) for _ in range(3)]
        tape.free(tape.tokens(heads * (4 * layer.head_dim + 4)))
        tape.free(*saved, grad)
        if shared:
            _sum_heads(tape, grads, (2, 1), layer.key_value_size * width)
        _hand_back(tape, (query, key, value), grads)

    if query.requires_grad:
        tape.nodes.append(backward)
    return result


def _eager_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """Attention as matrix products: scores are written, normalised in fp32 and saved in 16 bits."""
    heads = layer.num_attention_heads
    repeated_size = layer.query_size * width
    repeats = layer.num_attention_heads != layer.num_key_value_heads
    repeated = [tape.tokens(repeated_size) if repeats else hold(v.buffer) for v in (key, value)]
    scores = [tape.allocate(Size(per_score=heads * width))]

    def elementwise(size: int) -> None:
        scores.append(tape.allocate(Size(per_score=heads * size)))
        tape.free(scores.pop(0))

    elementwise(width)
    saved_tanh = None
    if layer.attention_softcap:
        elementwise(width)
        elementwise(width)
        saved_tanh = tape.save(scores[0])
        elementwise(width)
    elementwise(width)
    wide = tape.allocate(Size(per_score=heads * FP32))
    weights32 = tape.allocate(Size(per_score=heads * FP32))
    saved_weights32 = tape.save(weights32)
    tape.free(wide)
    weights = tape.allocate(Size(per_score=heads * width))
    tape.free(weights32, scores.pop())
    result = Value(tape.tokens(layer.query_size * width), query.requires_grad, width)
    saved = [tape.save(b) for b in (query.buffer, repeated[0], repeated[1], weights)]
    result.buffer = _transposed(tape, result.buffer, layer.query_size * width)
    tape.free(*repeated)
    # Attention returns its weights beside its output, and the layer holds both until it returns.
    tape.hold_in_layer(weights)

    def backward() -> None:
        grad = tape.take_grad(result)
        value_grad = tape.tokens(repeated_size)
        weights_grad = tape.allocate(Size(per_score=heads * width))
        tape.free(grad, saved[2], saved[3])
        wide_grad = tape.allocate(Size(per_score=heads * FP32))
        tape.free(weights_grad)
        softmax_grad = tape.allocate(Size(per_score=heads * FP32))
        elementwise_product = tape.allocate(Size(per_score=heads * FP32))
        tape.free(elementwise_product, wide_grad, saved_weights32)
        narrow = tape.allocate(Size(per_score=heads * width))
        tape.free(softmax_grad)
        for _ in range(4 if layer.attention_softcap else 1):
            step = tape.allocate(Size(per_score=heads * width))
            tape.free(narrow)
            narrow = step
        tape.free(saved_tanh)
        query_grad, key_grad = tape.tokens(layer.query_size * width), tape.tokens(repeated_size)
        tape.free(narrow, saved[0], saved[1])
        grads = [query_grad, key_grad, value_grad]
        if repeats:
            _sum_heads(tape, grads, (1, 2), layer.key_value_size * width)
        _hand_back(tape, (query, key, value), grads)

    if query.requires_grad:
        tape.nodes.append(backward)
    return result


def _math_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """torch's sdpa where no kernel applies (fp32 with fewer key heads than query heads): matrix products.

    Query and key are scaled first, keys and values repeated to all heads, scores and probabilities written.
    """
    heads = layer.num_attention_heads
    whole = layer.query_size * width
    scaled_query = tape.tokens(whole)
    triangle = tape.allocate(Size(per_score=1))
    tape.free(tape.allocate(Size(per_score=1)))
    additive = tape.allocate(Size(per_score=width))
    tape.free(triangle)
    repeated_key, repeated_value = tape.tokens(whole), tape.tokens(whole)
    scaled_key = tape.tokens(whole)
    scores = tape.allocate(Size(per_score=heads * width))
    saved = [tape.save(buffer) for buffer in (scaled_query, scaled_key)]
    tape.free(scaled_key)
    weights = tape.allocate(Size(per_score=heads * width))
    tape.free(tape.allocate(Size(per_score=heads)), scores)
    saved += [tape.save(weights), tape.save(repeated_value)]
    result = Value(tape.tokens(whole), query.requires_grad, width)
    tape.free(repeated_key, repeated_value, scaled_query, additive, weights)
    result.buffer = _transposed(tape, result.buffer, whole)

    def backward() -> None:
        grad = tape.take_grad(result)
        value_grad = tape.tokens(whole)
        weights_grad = tape.allocate(Size(per_score=heads * width))
        tape.free(saved[3], grad)
        scores_grad = tape.allocate(Size(per_score=heads * width))
        tape.free(tape.allocate(Size(per_score=heads * width)), saved[2], weights_grad)
        query_grad, key_grad = tape.tokens(whole), tape.tokens(whole)
        tape.free(saved[0], saved[1], scores_grad)
        unscaled = tape.tokens(whole)
        tape.free(query_grad)
        grads = [unscaled, key_grad, value_grad]
        _sum_heads(tape, grads, (2, 1), layer.key_value_size * width)
        _hand_back(tape, (query, key, value), grads)

    if query.requires_grad:
        tape.nodes.append(backward)
    return result


KERNELS = {
    "fused": _fused_attention,
    "masked": _masked_attention,
    "math": _math_attention,
    "eager": _eager_attention,
}
"""By LayerKnobs.attention: flash attention or flex attention without a mask, sdpa with a mask, sdpa without a
kernel of its own, matrix products in transformers."""
