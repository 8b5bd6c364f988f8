"""Replay of one decoder layer, op by op, as transformers runs it.

Sources: transformers models/{llama,qwen2,qwen3,mistral,gemma2,gemma3,phi3,olmo2,granite}/modeling_*.py,
integrations/sdpa_attention.py; allocation traces of real steps on an H100 (tests/stack/traces).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.memory.experts import experts
from planner.memory.linear import LinearKind, linear, weight_gradient
from planner.memory.tape import Buffer, Size, Tape, Value
from planner.model_spec import LayerSpec

FP32 = 4
FP32_NORMS = ("rms_fp32_weight",)
NORM_SCRATCH_BYTES = 2 * FP32
"""Bytes an element of the scratch buffer in which CUDA reduces a trained norm weight's gradient over tokens
(seen in traces llama_f and qwen3_f)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKnobs:
    """What the setup says about every layer: kinds of linear layers by module name, and attention.

    `attention` is "sdpa", "eager" or "flash_attention_2"; `masked` says that sdpa gets a mask (a batch
    with padding, or a sliding window shorter than the sequence).
    """

    kinds: tuple[tuple[str, LinearKind], ...]
    default: LinearKind
    attention: str
    masked: bool

    def kind(self, name: str) -> LinearKind:
        """The kind of the linear layer of that module name."""
        for known, kind in self.kinds:
            if known == name:
                return kind
        return self.default


def replay(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, hidden: Value) -> Value:
    """Replay the forward pass; backward lies on the tape. The caller keeps its hold on `hidden`."""
    residual = hidden
    normed = norm(tape, layer, knobs, hidden, layer.hidden_size) if layer.input_norms else _again(hidden)
    attended = _attention(tape, layer, knobs, normed)
    tape.free(normed.buffer)
    middle = _add_residual(tape, layer, knobs, residual, attended)
    normed = norm(tape, layer, knobs, middle, layer.hidden_size) if layer.input_norms else _again(middle)
    output = _mlp(tape, layer, knobs, normed)
    tape.free(normed.buffer)
    result = _add_residual(tape, layer, knobs, middle, output)
    tape.free(middle.buffer)
    return result


def norm(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value, size: int, *, groups: int = 1) -> Value:
    """RMSNorm of `size` features a token in `groups` (heads): the fp32 input and inverse roots are saved."""
    kind = knobs.default
    width = kind.activation_bytes
    casts = width != FP32
    wide = tape.tokens(size * FP32) if casts else _hold(x.buffer)
    tape.free(tape.tokens(size * FP32))
    root = tape.tokens(groups * FP32)
    saved_wide = tape.save(wide) if x.requires_grad else None
    saved_root = tape.save(root) if x.requires_grad else None
    tape.free(root)
    scaled = tape.tokens(size * FP32)
    saved_scaled = None
    if layer.norm in FP32_NORMS:
        if kind.trained:
            saved_scaled = tape.save(scaled)
        weighted = tape.tokens(size * FP32)
        # Gemma's norm lets go of the unweighted tensor here, OLMo 2's (no input norms) when it returns.
        held = None if layer.input_norms else _hold(scaled)
        tape.free(scaled, wide)
        result = Value(tape.tokens(size * width) if casts else _hold(weighted), x.requires_grad)
        tape.free(weighted, held)
    else:
        tape.free(wide)
        narrow = tape.tokens(size * width) if casts else _hold(scaled)
        if kind.trained:
            saved_scaled = tape.save(narrow)
        result = Value(tape.tokens(size * width), x.requires_grad)
        tape.free(narrow, scaled)
    if x.requires_grad:
        fp32 = layer.norm in FP32_NORMS
        saved = (saved_wide, saved_root)
        tape.nodes.append(lambda: _norm_backward(tape, kind, x, result, size, saved, saved_scaled, fp32))
    return result


def _norm_backward(
    tape: Tape,
    kind: LinearKind,
    x: Value,
    result: Value,
    size: int,
    saved: tuple[Buffer | None, Buffer | None],
    saved_scaled: Buffer | None,
    fp32_weight: bool,
) -> None:
    width = kind.activation_bytes
    casts = width != FP32
    grad = tape.take_grad(result)
    if fp32_weight and casts:
        wide = tape.tokens(size * FP32)
        tape.free(grad)
        grad = wide
    product = FP32 if fp32_weight else width
    weighted = tape.tokens(size * product)
    if kind.trained:
        # The weight's gradient: a product per element, reduced over tokens with a global scratch buffer.
        elementwise = tape.tokens(size * product)
        tape.free(tape.tokens(size * NORM_SCRATCH_BYTES), elementwise, saved_scaled)
        weight_gradient(tape, kind, size, kind.adapter_bytes)
    tape.free(grad)
    grad = weighted
    if not fp32_weight and casts:
        wide = tape.tokens(size * FP32)
        tape.free(grad)
        grad = wide
    to_rsqrt = tape.tokens(size * FP32)
    to_input = tape.tokens(size * FP32)
    tape.free(to_rsqrt, grad)
    expanded = tape.tokens(size * FP32)
    power = tape.tokens(size * FP32)
    doubled = tape.tokens(size * FP32)
    through_square = tape.tokens(size * FP32)
    tape.free(doubled, power, expanded, through_square, *saved)
    if casts:
        narrow = tape.tokens(size * width)
        tape.free(to_input)
        to_input = narrow
    tape.add_grad(x, to_input)


def _attention(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value) -> Value:
    width = knobs.default.activation_bytes
    query_size, kv_size = layer.query_size, layer.key_value_size
    if layer.fused_qkv:
        fused = linear(tape, knobs.kind("qkv_proj"), x, layer.hidden_size, query_size + 2 * kv_size)
        query, key, value = _split(tape, fused, (query_size, kv_size, kv_size), width)
        tape.free(fused.buffer)
    else:
        query = linear(tape, knobs.kind("q_proj"), x, layer.hidden_size, query_size)
        query = _qk_norm(tape, layer, knobs, query, query_size)
        key = linear(tape, knobs.kind("k_proj"), x, layer.hidden_size, kv_size)
        key = _qk_norm(tape, layer, knobs, key, kv_size)
        value = linear(tape, knobs.kind("v_proj"), x, layer.hidden_size, kv_size)
    if layer.rotary:
        rotated_query = _rotary(tape, layer, query, query_size * width)
        rotated_key = _rotary(tape, layer, key, kv_size * width)
        tape.free(query.buffer, key.buffer)
        query, key = rotated_query, rotated_key
    if knobs.attention == "eager":
        context = _eager_attention(tape, layer, query, key, value, width)
    elif knobs.masked:
        context = _masked_attention(tape, layer, query, key, value, width)
    else:
        context = _fused_attention(tape, layer, query, key, value, width)
    output = linear(tape, knobs.kind("o_proj"), context, query_size, layer.hidden_size)
    tape.free(context.buffer, query.buffer, key.buffer, value.buffer)
    return output


def _qk_norm(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value, size: int) -> Value:
    if layer.qk_norm == "none":
        return x
    groups = size // layer.head_dim if layer.qk_norm == "head" else 1
    normed = norm(tape, layer, knobs, x, size, groups=groups)
    tape.free(x.buffer)
    return normed


def _split(tape: Tape, fused: Value, sizes: tuple[int, ...], width: int) -> list[Value]:
    """Views of a fused projection; their gradients are padded to full width and summed."""
    whole = sum(sizes) * width
    parts = []
    for _ in sizes:
        parts.append(Value(_hold(fused.buffer), fused.requires_grad))

    def backward() -> None:
        for part in parts:
            padded = tape.tokens(whole)
            if part.grad is not None:
                tape.free(tape.take_grad(part))
            tape.add_grad(fused, padded)

    if fused.requires_grad:
        tape.nodes.append(backward)
    return parts


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
    result = Value(rotated, x.requires_grad)

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


def _fused_attention(
    tape: Tape, layer: LayerSpec, query: Value, key: Value, value: Value, width: int
) -> Value:
    """Flash attention in torch's sdpa, without a mask: output and log-sum-exp are saved.

    Backward takes a workspace of heads * (8 * head_dim + 4) bytes a token: fp32 queries' gradient plus, in
    16 bits, keys' and values' gradients expanded to all heads, plus one fp32 sum a head.
    """
    heads = layer.num_attention_heads
    context = tape.tokens(layer.query_size * width)
    statistics = tape.tokens(heads * FP32)
    saved = [tape.save(buffer) for buffer in (query.buffer, key.buffer, value.buffer, context, statistics)]
    tape.free(statistics)
    if layer.rotary_concatenated:
        # torch.cat lays queries out head first, attention follows, and transposing back is a copy.
        transposed = tape.tokens(layer.query_size * width)
        tape.free(context)
        context = transposed
    result = Value(context, query.requires_grad)

    def backward() -> None:
        grad = tape.take_grad(result)
        grads = [tape.tokens(layer.query_size * width)]
        grads += [tape.tokens(layer.key_value_size * width) for _ in range(2)]
        tape.free(tape.tokens(heads * (8 * layer.head_dim + 4)))
        tape.free(*saved, grad)
        for target, target_grad in zip((query, key, value), grads, strict=True):
            tape.add_grad(target, target_grad)

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
    repeated = [tape.tokens(whole) if repeats else _hold(v.buffer) for v in (key, value)]
    additive = tape.allocate(Size(per_score=width))
    result = Value(tape.tokens(whole), query.requires_grad)
    statistics = tape.tokens(heads * FP32)
    saved = [tape.save(b) for b in (query.buffer, *repeated, additive, result.buffer, statistics)]
    tape.free(*repeated, additive, statistics)

    def backward() -> None:
        grad = tape.take_grad(result)
        grads = [tape.tokens(whole) for _ in range(3)]
        tape.free(tape.tokens(heads * (4 * layer.head_dim + 4)))
        tape.free(*saved, grad)
        if shared:
            for index in (2, 1):
                summed = tape.tokens(layer.key_value_size * width)
                tape.free(grads[index])
                grads[index] = summed
        for target, target_grad in zip((query, key, value), grads, strict=True):
            tape.add_grad(target, target_grad)

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
    repeated = [tape.tokens(repeated_size) if repeats else _hold(v.buffer) for v in (key, value)]
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
    tape.free(wide, scores.pop())
    weights = tape.allocate(Size(per_score=heads * width))
    tape.free(weights32)
    result = Value(tape.tokens(layer.query_size * width), query.requires_grad)
    saved = [tape.save(b) for b in (query.buffer, repeated[0], repeated[1], weights)]
    transposed = tape.tokens(layer.query_size * width)
    tape.free(result.buffer, *repeated, weights)
    result.buffer = transposed

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
            for index in (1, 2):
                summed = tape.tokens(layer.key_value_size * width)
                tape.free(grads[index])
                grads[index] = summed
        for target, target_grad in zip((query, key, value), grads, strict=True):
            tape.add_grad(target, target_grad)

    if query.requires_grad:
        tape.nodes.append(backward)
    return result


def _mlp(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, x: Value) -> Value:
    width = knobs.default.activation_bytes
    inner = layer.intermediate_size
    if layer.experts:
        return experts(tape, layer, knobs.kind("experts"), x, router=knobs.kind("router"))
    if layer.fused_gate_up:
        fused = linear(tape, knobs.kind("gate_up_proj"), x, layer.hidden_size, 2 * inner)
        gate, up = _split(tape, fused, (inner, inner), width)
        tape.free(fused.buffer)
        activated = _activation(tape, gate, inner * width)
    else:
        gate = linear(tape, knobs.kind("gate_proj"), x, layer.hidden_size, inner)
        activated = _activation(tape, gate, inner * width)
        up = linear(tape, knobs.kind("up_proj"), x, layer.hidden_size, inner)
    product = _multiply(tape, activated, up, inner * width)
    output = linear(tape, knobs.kind("down_proj"), product, inner, layer.hidden_size)
    tape.free(product.buffer)
    return output


def _activation(tape: Tape, x: Value, size: float) -> Value:
    """Activation function; takes over the caller's hold on `x`."""
    result = Value(tape.tokens(size), x.requires_grad)
    saved = tape.save(x.buffer)
    tape.free(x.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        x_grad = tape.tokens(size)
        tape.free(grad, saved)
        tape.add_grad(x, x_grad)

    if x.requires_grad:
        tape.nodes.append(backward)
    return result


def _multiply(tape: Tape, left: Value, right: Value, size: float) -> Value:
    """Elementwise product; takes over the caller's holds on both factors."""
    result = Value(tape.tokens(size), True)
    saved = (tape.save(left.buffer), tape.save(right.buffer))
    tape.free(left.buffer, right.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        left_grad, right_grad = tape.tokens(size), tape.tokens(size)
        tape.free(*saved, grad)
        tape.add_grad(left, left_grad)
        tape.add_grad(right, right_grad)

    tape.nodes.append(backward)
    return result


def _add_residual(tape: Tape, layer: LayerSpec, knobs: LayerKnobs, residual: Value, branch: Value) -> Value:
    """residual + branch, the branch normed or scaled first where the model does; takes over `branch`."""
    size = layer.hidden_size * knobs.default.activation_bytes
    if layer.output_norms:
        normed = norm(tape, layer, knobs, branch, layer.hidden_size)
        tape.free(branch.buffer)
        branch = normed
    if layer.residual_multiplier:
        branch = _scale(tape, branch, size)
    result = Value(tape.tokens(size), residual.requires_grad or branch.requires_grad)
    tape.free(branch.buffer)
    addend = branch

    def backward() -> None:
        grad = tape.take_grad(result)
        tape.add_grad(residual, _hold(grad))
        tape.add_grad(addend, grad)

    tape.nodes.append(backward)
    return result


def _scale(tape: Tape, x: Value, size: float) -> Value:
    result = Value(tape.tokens(size), x.requires_grad)
    tape.free(x.buffer)

    def backward() -> None:
        grad = tape.take_grad(result)
        scaled = tape.tokens(size)
        tape.free(grad)
        tape.add_grad(x, scaled)

    tape.nodes.append(backward)
    return result


def _hold(buffer: Buffer) -> Buffer:
    buffer.holders += 1
    return buffer


def _again(x: Value) -> Value:
    """The same tensor under a name of its own: one more holder, gradients go to the original."""
    x.buffer.holders += 1
    return x
