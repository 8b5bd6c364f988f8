"""Attention's result weighed by sinks, as transformers does it after flex attention's kernel.

A sink is a score of each head beside those of tokens, which takes its share of the softmax and has no value:
what the kernel returns is multiplied by what it leaves. Source: transformers 5.23,
integrations/flex_attention.py (flex_attention_forward); torch's autocast computes logsumexp and exp in fp32
(aten autocast_mode.h).
"""

from __future__ import annotations

from planner.base.units import FP32
from planner.memory.tape.tape import Buffer, Tape, Value
from planner.models.spec import LayerSpec


def weigh_by_sinks(tape: Tape, layer: LayerSpec, context: Value, statistics: Buffer) -> Value:
    """Put the weighing on the tape; takes over the caller's holds on `context` and on the kernel's
    `statistics` (log-sum-exp, fp32).
    """
    heads, size, width = layer.num_attention_heads, layer.query_size, context.width
    casts = width != FP32
    narrow = tape.tokens(heads * width) if casts else None
    beside = tape.tokens(2 * heads * width)
    wide = tape.tokens(2 * heads * FP32) if casts else None
    tape.free(beside if casts else None)
    scores = wide or beside
    combined = tape.tokens(heads * FP32)
    saved = [tape.save(one) for one in (scores, combined)] if context.requires_grad else []
    tape.free(scores)
    difference = tape.tokens(heads * FP32)
    share = tape.tokens(heads * FP32)
    tape.free(difference)
    weighed = tape.tokens(size * FP32)
    if context.requires_grad:
        # The exponential and the product both keep the share.
        saved += [tape.save(share), tape.save(share), tape.save(context.buffer)]
    tape.free(context.buffer)
    result = weighed
    if casts:
        result = tape.tokens(size * width)
        tape.free(weighed)
    tape.free(narrow, combined, share, statistics)
    made = Value(result, context.requires_grad, width)

    def backward() -> None:
        grad = tape.take_grad(made)
        if casts:
            cast = tape.tokens(size * FP32)
            tape.free(grad)
            grad = cast
        to_context = tape.tokens(size * FP32)
        product = tape.tokens(size * FP32)
        if casts:
            own = tape.tokens(size * width)
            tape.free(to_context)
            to_context = own
        to_share = tape.tokens(heads * FP32)
        tape.free(product, grad, *saved[3:])
        to_scores = tape.tokens(2 * heads * FP32)
        tape.free(to_scores, to_share, *saved[:3])
        tape.add_grad(context, to_context)

    if context.requires_grad:
        tape.nodes.append(backward)
    return made
