"""Rotary embedding on the tape (transformers models/*/modeling_*.py, apply_rotary_pos_emb), without Liger."""

from __future__ import annotations

from collections.abc import Sequence

from planner.memory.tape.tape import Buffer, Tape, Value
from planner.models.spec import LayerSpec


def rotate(tape: Tape, layer: LayerSpec, query: Value, key: Value) -> tuple[Value, Value]:
    """Queries and keys with the first `rotary_dim` features of each head rotated; takes over both holds."""
    parts = [(query, layer.query_size * query.width), (key, layer.key_value_size * key.width)]
    share = (layer.rotary_dim or layer.head_dim) / layer.head_dim
    results = []
    for x, whole in parts:
        rotated = _forward(tape, whole * share)
        if layer.rotary_concatenated:
            joined = tape.tokens(whole)
            tape.free(rotated)
            rotated = joined
        results.append(Value(rotated, x.requires_grad, x.width))
    tape.free(query.buffer, key.buffer)
    _append_backward(tape, parts, results, share, concatenated=layer.rotary_concatenated)
    return results[0], results[1]


def _forward(tape: Tape, size: float) -> Buffer:
    cosine = tape.tokens(size)
    half = tape.tokens(size / 2)
    turned = tape.tokens(size)
    tape.free(half)
    sine = tape.tokens(size)
    tape.free(turned)
    rotated = tape.tokens(size)
    tape.free(cosine, sine)
    return rotated


def _append_backward(
    tape: Tape,
    parts: Sequence[tuple[Value, float]],
    results: Sequence[Value],
    share: float,
    *,
    concatenated: bool,
) -> None:
    """Backward of each rotation; where torch.cat joined features, slices are padded after both rotations."""
    pending: list[tuple[Buffer, Buffer]] = []

    def join(x: Value, whole: float) -> None:
        grad, padded = pending.pop(0)
        joined = tape.tokens(whole)
        tape.free(grad, padded)
        tape.add_grad(x, joined)

    def turn(x: Value, whole: float, result: Value) -> None:
        grad = tape.take_grad(result)
        padded = _backward(tape, whole * share)
        if concatenated:
            pending.append((grad, padded))
        else:
            tape.free(grad)
            tape.add_grad(x, padded)

    turned = [
        (x, whole, result) for (x, whole), result in zip(parts, results, strict=True) if x.requires_grad
    ]
    if concatenated:
        for x, whole, _ in turned:
            tape.nodes.append(lambda x=x, whole=whole: join(x, whole))  # type: ignore[misc]
    for x, whole, result in turned:
        tape.nodes.append(lambda x=x, whole=whole, result=result: turn(x, whole, result))  # type: ignore[misc]


def _backward(tape: Tape, size: float) -> Buffer:
    """The gradient of the rotated features; the caller holds that of the result."""
    sine_grad = tape.tokens(size)
    half_grad = tape.tokens(size / 2)
    padded = tape.tokens(size)
    tape.free(half_grad)
    other = tape.tokens(size)
    tape.free(sine_grad, other)
    tape.free(tape.tokens(size))
    return padded
