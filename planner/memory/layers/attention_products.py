"""Attention as matrix products that write every score: transformers' eager one, and sdpa without a kernel.

Sources: transformers models/*/modeling_*.py, eager_attention_forward; allocation traces of real steps on an
H100 (tests/stack/traces).
"""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.layers.elementwise import hold
from planner.memory.layers.heads import hand_back, sum_heads, tracked, transposed
from planner.memory.tape.tape import Buffer, Size, Tape, Value
from planner.models.spec import LayerSpec


def eager_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """Attention of one sequence: scores are written, normalised in fp32 and saved in 16 bits."""
    return _eager(tape, layer, (query, key, value), width, batched=False)


def batched_eager_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """Attention of several sequences: torch.matmul copies what is not laid out sequence by sequence."""
    return _eager(tape, layer, (query, key, value), width, batched=True)


def _eager(
    tape: Tape, layer: LayerSpec, inputs: tuple[Value, Value, Value], width: int, *, batched: bool
) -> Value:
    query, key, value = inputs
    heads, whole = layer.num_attention_heads, layer.query_size * width
    context = layer.context_size * width
    repeats = heads != layer.num_key_value_heads
    repeated = [
        tape.tokens(size) if repeats else hold(v.buffer) for v, size in ((key, whole), (value, context))
    ]
    # Rotation by torch.cat lays queries and keys out head by head, as repetition does; a projection does not.
    rotated = batched and not layer.rotary_concatenated
    operands = [
        tape.tokens(whole) if rotated else hold(query.buffer),
        tape.tokens(whole) if rotated and not repeats else hold(repeated[0]),
    ]
    scores = tape.allocate(Size(per_score=heads * width))
    through_scores, asked = tracked(query, key), tracked(*inputs)
    saved = [
        tape.save(operand) if other.requires_grad else None
        for operand, other in zip(operands, (key, query), strict=True)
    ]
    tape.free(*operands)
    saved_tanh, saved_weights32, weights = _softmax(tape, layer, scores, width, saves=through_scores)
    value_operand = tape.tokens(context) if batched and not repeats else hold(repeated[1])
    result = Value(tape.tokens(context), asked, width)
    saved += [
        tape.save(value_operand) if through_scores else None,
        tape.save(weights) if value.requires_grad else None,
    ]
    tape.free(value_operand)
    result.buffer = transposed(tape, result.buffer, context)
    tape.free(*repeated)
    # Attention returns its weights beside its output, and the layer holds both until it returns.
    tape.hold_in_layer(weights)

    def backward() -> None:
        grad = tape.take_grad(result)
        if batched:
            grad = transposed(tape, grad, context)
        value_grad = tape.tokens(context) if value.requires_grad else None
        weights_grad = tape.allocate(Size(per_score=heads * width)) if through_scores else None
        done = (grad, saved[2], saved[3])
        tape.free(*(reversed(done) if batched else done))
        grads: list[Buffer | None] = [None, None, value_grad]
        if weights_grad is not None:
            scores_grad = _softmax_backward(tape, layer, weights_grad, saved_weights32, saved_tanh, width)
            for index, operand in enumerate((query, key)):
                grads[index] = tape.tokens(whole) if operand.requires_grad else None
            tape.free(*((saved[0], saved[1], scores_grad) if batched else (scores_grad, saved[0], saved[1])))
        if repeats:
            sum_heads(tape, inputs, grads, (1, 2), layer.key_value_size * width)
        hand_back(tape, inputs, grads)

    if asked:
        tape.nodes.append(backward)
    return result


def _softmax(
    tape: Tape, layer: LayerSpec, scores: Buffer, width: int, *, saves: bool
) -> tuple[Buffer | None, Buffer | None, Buffer]:
    """From raw scores to weights: scaled, capped, masked, normalised. What is saved, and the weights."""
    heads = layer.num_attention_heads

    def elementwise(old: Buffer) -> Buffer:
        new = tape.allocate(Size(per_score=heads * width))
        tape.free(old)
        return new

    scores = elementwise(scores)
    saved_tanh = None
    if layer.attention_softcap:
        scores = elementwise(elementwise(scores))
        saved_tanh = tape.save(scores) if saves else None
        scores = elementwise(scores)
    scores = elementwise(scores)
    wide = tape.allocate(Size(per_score=heads * FP32))
    weights32 = tape.allocate(Size(per_score=heads * FP32))
    saved_weights32 = tape.save(weights32) if saves else None
    tape.free(wide)
    weights = tape.allocate(Size(per_score=heads * width))
    tape.free(weights32, scores)
    return saved_tanh, saved_weights32, weights


def _softmax_backward(
    tape: Tape,
    layer: LayerSpec,
    weights_grad: Buffer,
    saved_weights32: Buffer | None,
    saved_tanh: Buffer | None,
    width: int,
) -> Buffer:
    """The gradient of raw scores."""
    heads = layer.num_attention_heads
    wide_grad = tape.allocate(Size(per_score=heads * FP32))
    tape.free(weights_grad)
    softmax_grad = tape.allocate(Size(per_score=heads * FP32))
    product = tape.allocate(Size(per_score=heads * FP32))
    tape.free(product, saved_weights32, wide_grad)
    narrow = tape.allocate(Size(per_score=heads * width))
    tape.free(softmax_grad)
    for _ in range(4 if layer.attention_softcap else 1):
        step = tape.allocate(Size(per_score=heads * width))
        tape.free(narrow)
        narrow = step
    tape.free(saved_tanh)
    return narrow


def math_attention(tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int) -> Value:
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
    through_scores, asked = tracked(query, key), tracked(query, key, value)
    saved = [
        tape.save(scaled_query) if key.requires_grad else None,
        tape.save(scaled_key) if query.requires_grad else None,
    ]
    tape.free(scaled_key)
    weights = tape.allocate(Size(per_score=heads * width))
    tape.free(tape.allocate(Size(per_score=heads)), scores)
    # The softmax saves its result, and so does the product for the gradient of values.
    saved += [
        tape.save(weights) if asked else None,
        tape.save(repeated_value) if through_scores else None,
    ]
    result = Value(tape.tokens(whole), asked, width)
    tape.free(repeated_key, repeated_value, scaled_query, additive, weights)
    result.buffer = transposed(tape, result.buffer, whole)

    def backward() -> None:
        grad = tape.take_grad(result)
        grads: list[Buffer | None] = [None, None, tape.tokens(whole) if value.requires_grad else None]
        weights_grad = tape.allocate(Size(per_score=heads * width)) if through_scores else None
        tape.free(saved[3], grad)
        if weights_grad is not None:
            scores_grad = tape.allocate(Size(per_score=heads * width))
            tape.free(tape.allocate(Size(per_score=heads * width)), saved[2], weights_grad)
            for index, operand in enumerate((query, key)):
                grads[index] = tape.tokens(whole) if operand.requires_grad else None
            tape.free(saved[0], saved[1], scores_grad)
            if grads[0] is not None:
                unscaled = tape.tokens(whole)
                tape.free(grads[0])
                grads[0] = unscaled
        else:
            tape.free(saved[2])
        sum_heads(tape, (query, key, value), grads, (2, 1), layer.key_value_size * width)
        hand_back(tape, (query, key, value), grads)

    if asked:
        tape.nodes.append(backward)
    return result
