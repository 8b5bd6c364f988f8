"""Self-attention on the tape: projections, rotary embedding, and the kernels transformers can call.

Sources: transformers models/*/modeling_*.py, integrations/sdpa_attention.py; allocation traces of real steps
on an H100 (tests/stack/traces).
"""

from __future__ import annotations

from dataclasses import replace

from planner.base.units import FP32
from planner.memory.layers.attention_products import batched_eager_attention, eager_attention, math_attention
from planner.memory.layers.attention_sinks import weigh_by_sinks
from planner.memory.layers.elementwise import again, cast, copy, hold, split
from planner.memory.layers.heads import hand_back, sum_heads, tracked, transposed
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.layers.linear import linear
from planner.memory.layers.norms import norm
from planner.memory.layers.rotary import rotate
from planner.memory.tape.tape import Buffer, Size, Tape, Value
from planner.models.spec import LayerSpec

BACKWARD_CONSTANT = 512
"""Bytes beside what tokens take of a fused kernel's scratch buffer in its backward pass (seen in an H200's
allocations of whole runs of gemma-3-1b and qwen2.5-1.5b)."""


def attention(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value) -> Value:
    """The attention block from normed input to the output projection's result, held once."""
    query_size, kv_size = layer.query_size, layer.key_value_size
    if layer.fused_qkv:
        fused = linear(tape, knobs.kind("qkv_proj"), x, layer.hidden_size, query_size + 2 * kv_size)
        parts = split(tape, fused, (query_size, kv_size, kv_size))
        tape.free(fused.buffer)
        query, key, value = (
            _by_heads(tape, layer, knobs, name, part) for name, part in zip("qkv", parts, strict=True)
        )
    else:
        query, key, value = _projections(tape, layer, knobs, x)
    if knobs.liger:
        # Liger's kernel rotates in place, forward and backward; views of a fused projection are copied first.
        layer = replace(layer, rotary_concatenated=False)
        if layer.fused_qkv:
            query, key = copy(tape, query, query_size), copy(tape, key, kv_size)
        elif _norms_late(layer):
            heads = query.buffer, key.buffer
            query, key = copy(tape, again(query), query_size), copy(tape, again(key), kv_size)
            tape.free(*heads)
    elif layer.rotary:
        query, key = rotate(tape, layer, query, key)
    context = attend(tape, layer, knobs, query, key, value)
    output = linear(tape, knobs.kind("o_proj"), context, query_size, layer.hidden_size)
    tape.free(context.buffer, query.buffer, key.buffer, value.buffer)
    return output


def attend(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, query: Value, key: Value, value: Value) -> Value:
    """Attention by the kernel that runs; its result is held once, the caller keeps its holds on the rest."""
    width = knobs.default.compute_width
    parts = ((key, layer.key_value_size), (value, layer.value_size), (query, layer.query_size))
    inputs = [cast(tape, part, size, width) for part, size in parts]
    context = _BY_KERNEL[knobs.attention](tape, layer, inputs[2], inputs[0], inputs[1], width)
    tape.free(*(part.buffer for part in inputs))
    return context


def hands_back_by_heads(layer: LayerSpec, kernel: str) -> bool:
    """Whether a kernel's gradients of keys and values lie head by head: where a matrix product makes them, or
    they are summed over repeated heads. Flash attention's have their projections' layout.
    """
    return kernel not in ("fused", "masked", "flex") or repeats_keys(layer, kernel)


def _projections(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value) -> tuple[Value, Value, Value]:
    """Queries, keys and values, with norms over heads where the model has them: Gemma 3's come last."""
    late = _norms_late(layer)
    found = {}
    for name, size in (("q", layer.query_size), ("k", layer.key_value_size), ("v", layer.key_value_size)):
        part = linear(tape, knobs.kind(f"{name}_proj"), x, layer.hidden_size, size)
        part = _by_heads(tape, layer, knobs, name, part)
        found[name] = part if late or name == "v" else _qk_norm(tape, layer, knobs, part, size)
    if late:
        found["q"] = _qk_norm(tape, layer, knobs, found["q"], layer.query_size)
        found["k"] = _qk_norm(tape, layer, knobs, found["k"], layer.key_value_size)
    return found["q"], found["k"], found["v"]


def _norms_late(layer: LayerSpec) -> bool:
    """Whether queries and keys are normed last, each as its heads see it: Gemma 3's."""
    return layer.normed_around and layer.qk_norm != "none"


def _by_heads(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, name: str, x: Value) -> Value:
    """A projection seen head by head. Its gradient comes back head by head, and is copied, from rotation and
    from matrix products; flash attention's own gradient of values has the projection's layout, and so has one
    head of any kernel (PyTorch copies what a view cannot say).
    """
    heads = layer.num_attention_heads if name == "q" else layer.num_key_value_heads
    if knobs.liger or not x.requires_grad or heads == 1:
        return x
    own_layout = not hands_back_by_heads(layer, knobs.attention)
    if own_layout if name == "v" else not layer.rotary:
        return x
    features = layer.query_size if name == "q" else layer.key_value_size
    result = Value(x.buffer, True, x.width)

    def backward() -> None:
        grad = tape.take_grad(result)
        copied = tape.tokens(features * x.width)
        tape.free(grad)
        tape.add_grad(x, copied)

    tape.nodes.append(backward)
    return result


def _qk_norm(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value, size: int) -> Value:
    if layer.qk_norm == "none":
        return x
    groups = size // layer.head_dim if layer.qk_norm == "head" else 1
    if layer.qk_norm == "full":
        # Liger leaves OLMo 2's norms over all heads as they are (transformers/monkey_patch.py).
        knobs = replace(knobs, liger=False)
    read = again(x)
    if knobs.liger and _norms_late(layer):
        # Its kernel wants rows that lie together.
        read = copy(tape, read, size)
    normed = norm(tape, layer, knobs, read, size, groups=groups)
    tape.free(read.buffer, x.buffer)
    return normed


def _fused_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """Flash attention in torch's sdpa, without a mask: output and log-sum-exp are saved.

    Backward takes a workspace: the fp32 gradient of queries and one fp32 sum a head and, where query heads
    share keys, the 16-bit gradients of keys and values expanded to all heads.
    """
    heads = layer.num_attention_heads
    workspace = 2 * FP32 if layer.num_key_value_heads != heads else FP32
    context = tape.tokens(layer.context_size * width)
    statistics = tape.tokens(heads * FP32)
    tape.select(context, statistics)
    asked = tracked(query, key, value)
    read = (query.buffer, key.buffer, value.buffer, context, statistics) if asked else ()
    saved = [tape.save(buffer) for buffer in read]
    tape.free(statistics)
    if layer.rotary_concatenated:
        # torch.cat lays queries out head first, attention follows, and transposing back is a copy.
        context = transposed(tape, context, layer.context_size * width)
    result = Value(context, asked, width)

    def backward() -> None:
        grad = tape.take_grad(result)
        grads: list[Buffer | None] = [
            tape.tokens(size * width) for size in (layer.query_size, layer.key_value_size, layer.value_size)
        ]
        scratch = heads * (workspace * layer.head_dim + FP32)
        tape.free(tape.allocate(Size(constant=BACKWARD_CONSTANT, per_token=scratch)))
        tape.free(*saved, grad)
        hand_back(tape, (query, key, value), grads)

    if asked:
        tape.nodes.append(backward)
    return result


def repeats_keys(layer: LayerSpec, kernel: str) -> bool:
    """Whether keys and values are repeated to all heads before a kernel: with a mask (sdpa_attention.py), and
    by flex attention where the number of heads is no power of two (flex_attention.py:302).
    """
    heads = layer.num_attention_heads
    if layer.num_key_value_heads == heads:
        return False
    return kernel == "masked" or (kernel == "flex" and not flexes_shared(heads))


def flexes_shared(heads: int) -> bool:
    """Whether flex attention takes shared keys of so many query heads as they are."""
    return heads & (heads - 1) == 0


def _flex_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """Flex attention, which transformers compiles: output and log-sum-exp are saved."""
    whole = layer.query_size * width
    repeats = repeats_keys(layer, "flex")
    inputs = [tape.tokens(whole) if repeats else hold(v.buffer) for v in (key, value)]
    context = tape.tokens(whole)
    statistics = tape.tokens(layer.num_attention_heads * FP32)
    asked = tracked(query, key, value)
    read = (query.buffer, *inputs, context, statistics) if asked else ()
    saved = [tape.save(buffer) for buffer in read]
    tape.free(*inputs)
    if not layer.attention_sinks:
        tape.free(statistics)
        if layer.rotary_concatenated:
            context = transposed(tape, context, whole)
    result = Value(context, asked, width)

    def backward() -> None:
        grad = tape.take_grad(result)
        # The kernel wants the gradient in its output's layout, and sums their product once a head.
        copied = tape.tokens(whole)
        delta = tape.tokens(layer.num_attention_heads * FP32)
        tape.free(saved[3])
        grads: list[Buffer | None] = [tape.tokens(whole)]
        grads += [tape.tokens(whole if repeats else layer.key_value_size * width) for _ in range(2)]
        tape.free(*saved[:3], saved[4], copied, delta, grad)
        if repeats:
            sum_heads(tape, (query, key, value), grads, (2, 1), layer.key_value_size * width)
        hand_back(tape, (query, key, value), grads)

    if asked:
        tape.nodes.append(backward)
    if not layer.attention_sinks:
        return result
    weighed = weigh_by_sinks(tape, layer, result, statistics)
    if layer.rotary_concatenated:
        weighed.buffer = transposed(tape, weighed.buffer, whole)
    return weighed


def _masked_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """torch's sdpa with a mask: keys and values repeated to all heads, the mask made additive in 16 bits."""
    heads = layer.num_attention_heads
    whole = layer.query_size * width
    # A single key head is repeated by a view (sdpa_attention.py, repeat_kv: reshape of an expanded tensor).
    shared = heads != layer.num_key_value_heads
    repeats = shared and layer.num_key_value_heads > 1
    context = layer.context_size * width
    repeated = [
        tape.tokens(size) if repeats else hold(v.buffer) for v, size in ((key, whole), (value, context))
    ]
    additive = tape.allocate(Size(per_score=width))
    asked = tracked(query, key, value)
    result = Value(tape.tokens(context), asked, width)
    statistics = tape.tokens(heads * FP32)
    tape.select(result.buffer, statistics)
    read = (query.buffer, *repeated, additive, result.buffer, statistics) if asked else ()
    saved = [tape.save(buffer) for buffer in read]
    tape.free(statistics, additive, *repeated)
    if layer.rotary_concatenated:
        # As without a mask: the output follows the queries' order (padded phi-4 among the records).
        result.buffer = transposed(tape, result.buffer, context)

    def backward() -> None:
        grad = tape.take_grad(result)
        grads: list[Buffer | None] = [tape.tokens(size) for size in (whole, whole, context)]
        scratch = heads * FP32 * (layer.head_dim + 1)
        tape.free(tape.allocate(Size(constant=BACKWARD_CONSTANT, per_token=scratch)))
        tape.free(*saved, grad)
        if shared:
            sum_heads(tape, (query, key, value), grads, (2, 1), layer.key_value_size * width)
        hand_back(tape, (query, key, value), grads)

    if asked:
        tape.nodes.append(backward)
    return result


_BY_KERNEL = {
    "fused": _fused_attention,
    "masked": _masked_attention,
    "flex": _flex_attention,
    "math": math_attention,
    "eager": eager_attention,
    "batched_eager": batched_eager_attention,
}
"""By the names of planner.setup.attention.ATTENTION_KERNELS."""
