"""Linear layers and attention while a block is traced: named, not computed.

Their outputs want a gradient whatever feeds them, as those of layers with an adapter do. What of that is so
in a run is decided when the trace is replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.models.tracing.recorder import Recorder
from planner.base.errors import InputError
from planner.models.traced import ATTENTION, LINEAR

IMPLEMENTATION = "vramwise_traced"
"""The name under which transformers finds the attention of a trace."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One run of a linear layer or of attention: buffers read and made, and what the operation is."""

    kind: str
    name: str
    reads: tuple[int, ...]
    makes: int
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """What attention was asked to do: heads and their widths, its window, whether scores are capped or have
    sinks beside them, and whether queries lie in memory head by head, as torch.cat puts them together.
    """

    heads: int
    key_value_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    softcap: bool
    sinks: bool
    queries_by_heads: bool


class Calls:
    """The opaque operations of a block's run, in order."""

    def __init__(self, recorder: Recorder, *, method: str, dtype: torch.dtype, heads_first: bool) -> None:
        self.recorder = recorder
        self.method, self.dtype, self.heads_first = method, dtype, heads_first
        self.found: list[Call] = []
        self.attention: list[AttentionFacts] = []
        # Outputs want a gradient by this one, whatever the block's input does. `mixed`: a linear layer was
        # given another dtype than it computes in. `fused`: functions that a GPU may have a kernel for.
        self.asks = torch.zeros((), requires_grad=True)
        self.mixed = False
        self.fused: tuple[str, ...] = ()

    def note(self, call: Call) -> int:
        """Write down a call; returns its number. The recorder's events say when."""
        self.recorder.events.append(("call", len(self.found)))
        self.found.append(call)
        return len(self.found) - 1

    def linear_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Dtype of a linear layer's output: a quantised one returns its input's (bitsandbytes)."""
        self.mixed |= x.dtype != self.dtype
        return x.dtype if self.method == "qlora" else self.dtype


class _Linear(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    @staticmethod
    def forward(ctx: Any, x: Any, asks: Any, calls: Calls, name: str, outputs: int) -> Any:
        with calls.recorder.muted():
            made = x.new_empty((*x.shape[:-1], outputs), dtype=calls.linear_dtype(x))
        call = Call(
            kind=LINEAR,
            name=name,
            reads=(calls.recorder.number(x),),
            makes=calls.recorder.add(made),
            shape=(x.shape[-1], outputs),
        )
        ctx.call, ctx.shape, ctx.width = calls.note(call), x.shape, x.dtype
        return made

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.new_empty(ctx.shape, dtype=ctx.width), None, None, None, None


class _Attention(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, asks: Any, calls: Calls) -> Any:
        batch, heads, length, _ = query.shape
        with calls.recorder.muted():
            made = query.new_empty((batch, length, heads, value.shape[-1]))
        reads = tuple(calls.recorder.number(one) for one in (query, key, value))
        call = Call(kind=ATTENTION, name="attention", reads=reads, makes=calls.recorder.add(made))
        ctx.call = calls.note(call)
        ctx.shapes = tuple((one.shape, one.dtype) for one in (query, key, value))
        ctx.heads_first = calls.heads_first
        return made

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        grads = [_by_head(grad, shape, dtype, ctx.heads_first) for shape, dtype in ctx.shapes]
        return (*grads, None, None)


def _by_head(grad: Any, shape: Any, dtype: torch.dtype, heads_first: bool) -> Any:
    """A gradient in the layout of the kernel: flash attention's has tokens before heads."""
    if heads_first:
        return grad.new_empty(shape, dtype=dtype)
    batch, heads, length, width = shape
    return grad.new_empty((batch, length, heads, width), dtype=dtype).transpose(1, 2)


_current: list[Calls] = []


def traced_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    **rest: Any,
) -> tuple[Any, None]:
    """Attention as transformers calls it (integrations/sdpa_attention.py), for the block that is traced.

    Raises:
        InputError: it does what the memory model has no terms for.
    """
    if not _current:
        batch, heads, length, _ = query.shape
        return query.new_empty((batch, length, heads, value.shape[-1])), None
    for unknown in ("position_bias",):
        if rest.get(unknown) is not None:
            raise InputError(f"attention with a {unknown} is not modelled")
    calls = _current[-1]
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    calls.attention.append(
        AttentionFacts(
            heads=query.shape[1],
            key_value_heads=key.shape[1],
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            window=window,
            softcap=softcap is not None,
            sinks=s_aux is not None,
            queries_by_heads=query.stride(1) > query.stride(2),
        )
    )
    return _Attention.apply(query, key, value, calls.asks, calls), None


def register_attention() -> None:
    """Let transformers find the attention of a trace, which gets no mask tensor."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, traced_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)


@contextlib.contextmanager
def opaque(block: nn.Module, calls: Calls) -> Iterator[None]:
    """Within, a block's linear layers and attention are named and not computed."""
    changed = []
    for path, module in block.named_modules():
        if type(module) is nn.Linear:
            name = path.rpartition(".")[2]
            module.forward = _forward_of(module, calls, name)
            changed.append(module)
    _current.append(calls)
    try:
        yield
    finally:
        _current.pop()
        for module in changed:
            del module.forward


def _forward_of(module: nn.Linear, calls: Calls, name: str) -> Any:
    return lambda x: _Linear.apply(x, calls.asks, calls, name, module.out_features)
