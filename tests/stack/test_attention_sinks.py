"""Attention with sinks by flex attention: what transformers makes of its kernel's result, in bytes.

The kernel is a GPU's, and transformers refuses sinks on the CPU: here nothing has contents (torch's meta
device), and in the kernel's place is what gives out its result and its log-sum-exp.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations import flex_attention

from launcher.models.tracing.autocast import Fp32
from planner.memory.decoder.live_bytes import at, peak
from planner.memory.layers.attention_sinks import weigh_by_sinks
from planner.memory.tape.tape import Tape, Value
from planner.models.catalog import load_shipped

from .live_bytes import LiveBytes

pytestmark = pytest.mark.slow
LENGTH = 512


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return grad


def test_what_follows_the_kernel_takes_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = next(one for one in load_shipped("gpt-oss-20b").layers if one.attention_sinks)
    heads, width = layer.num_attention_heads, layer.head_dim
    query = torch.empty((1, heads, LENGTH, width), dtype=torch.bfloat16, device="meta", requires_grad=True)
    keys = query.new_empty((1, layer.num_key_value_heads, LENGTH, width))
    sinks = query.new_empty(heads)

    def kernel(query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, Any]:
        made, statistics = _Kernel.apply(query)
        return made, SimpleNamespace(lse=statistics)

    in_fp32 = torch.logsumexp
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", kernel)
    # CUDA's autocast computes it so (torch, aten/src/ATen/autocast_mode.h, AT_FORALL_FP32).
    monkeypatch.setattr(torch, "logsumexp", lambda x, **knobs: in_fp32(x.float(), **knobs))
    with LiveBytes([query, keys, sinks]) as live, Fp32():
        output, statistics = flex_attention.flex_attention_forward(
            SimpleNamespace(training=True), query, keys, keys, None, scaling=1.0, s_aux=sinks
        )
        del statistics
        forward, kept = live.peak_bytes, live.live_bytes
        gradient = torch.empty_like(output)
        live.reset_peak()
        output.backward(gradient)
        backward = live.peak_bytes

    tape = Tape(saves=True)
    whole = layer.query_size * 2
    context = Value(tape.tokens(whole), True, 2)
    weighed = weigh_by_sinks(tape, layer, context, tape.tokens(heads * 4))
    copied = tape.tokens(whole)
    tape.free(weighed.buffer)
    assert peak(tape.moments(), LENGTH, 0)[0] == pytest.approx(forward, rel=0.02)
    assert at(tape.live, LENGTH, 0) == pytest.approx(kept, rel=0.02)
    tape.forget_moments()
    weighed.grad = tape.tokens(whole)
    weighed.grad.holders += 1  # the test's own
    tape.backward()
    assert peak(tape.moments(), LENGTH, 0)[0] == pytest.approx(backward, rel=0.02)
    tape.free(copied)
