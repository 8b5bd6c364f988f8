"""Linear layers, attention and stacks of experts while a block is traced: named, not computed.

Their outputs want a gradient whatever feeds them, as those of layers with an adapter do. What of that is so
in a run is decided when the trace is replayed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launcher.models.tracing.recorder import Recorder
from planner.base.errors import InputError
from planner.models.storage import EXPERT_NAMES
from planner.models.traced import ATTENTION, EXPERTS, LINEAR, NO_STACKS, ROUTER, ROUTERS, STACK

IMPLEMENTATION = "vramwise_traced"
"""The name under which transformers finds the attention of a trace."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One run of a linear layer or of attention, or the reading of a stack: buffers read and made, and what
    the operation is. `place` is the stack's among those of its block.
    """

    kind: str
    name: str
    reads: tuple[int, ...]
    makes: int
    shape: tuple[int, ...] = ()
    place: int = -1


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

    def __init__(
        self,
        recorder: Recorder,
        *,
        method: str,
        dtype: torch.dtype,
        heads_first: bool,
        adapted: str,
        kernel: bool,
    ) -> None:
        self.recorder = recorder
        self.method, self.dtype, self.heads_first, self.adapted = method, dtype, heads_first, adapted
        # Attention with sinks is left to a kernel, rather than the module's own code recorded.
        self.kernel = kernel
        self.found: list[Call] = []
        # Nodes of stacks without an adapter, which no gradient reaches; how many experts a token is sent to.
        self.unasked: list[Any] = []
        self.stacks = 0
        self.routed: int | None = None
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

    @property
    def lays_out(self) -> bool:
        """Whether a kernel of attention ran, whose gradients' layout `heads_first` says."""
        return any(call.kind == ATTENTION for call in self.found)

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
) -> tuple[Any, Any]:
    """Attention as transformers calls it (integrations/sdpa_attention.py), for the block that is traced.

    Raises:
        InputError: it does what the memory model has no terms for.
    """
    batch, heads, length, _ = query.shape
    if not _current:
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
    if s_aux is not None and not calls.kernel:
        # No kernel of torch's sdpa has sinks: what runs is the module's own code, recorded with the rest.
        # Flex attention's does, with what transformers makes of its result.
        with calls.recorder.muted():
            mask = query.new_empty((batch, 1, length, key.shape[2]))
            calls.recorder.know([mask])
        run = sys.modules[type(module).__module__].eager_attention_forward
        output, weights = run(module, query, key, value, mask, s_aux=s_aux, **rest)
        return output, weights
    return _Attention.apply(query, key, value, calls.asks, calls), None


def register_attention() -> None:
    """Let transformers find the attention of a trace, which gets no mask tensor."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, traced_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)


@contextlib.contextmanager
def opaque(block: nn.Module, calls: Calls) -> Iterator[None]:
    """Within, a block's linear layers, attention and stacks are named and not computed."""
    changed = []
    with contextlib.ExitStack() as stacks:
        for path, module in block.named_modules():
            name = path.rpartition(".")[2]
            if type(module) is nn.Linear:
                module.forward = _forward_of(module, calls, name)
                changed.append(module)
            elif calls.method != "full":
                stacks.enter_context(_stacks_read(module, calls))
        _current.append(calls)
        try:
            yield
        finally:
            _current.pop()
            for module in changed:
                del module.forward


def _forward_of(module: nn.Linear, calls: Calls, name: str) -> Any:
    return lambda x: _Linear.apply(x, calls.asks, calls, name, module.out_features)


class _Stack(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    @staticmethod
    def forward(ctx: Any, weight: Any, asks: Any, calls: Calls, name: str, place: int) -> Any:
        with calls.recorder.muted():
            made = torch.empty_like(weight)
        makes = calls.recorder.add(made)
        call = Call(kind=STACK, name=name, reads=(), makes=makes, shape=tuple(weight.shape), place=place)
        ctx.call = calls.note(call)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, None, None, None, None


def stacks_of(module: nn.Module) -> dict[str, str]:
    """Names of a module's parameters that are stacks, with their names in a trace: experts' weights, and the
    router's that PEFT adapts as a parameter (planner/setup/trained.py).
    """
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        if name in EXPERT_NAMES and parameter.dim() == 3:
            found[name] = name
        elif name == "weight" and parameter.dim() == 2 and type(module).__name__.endswith("Router"):
            found[name] = ROUTER
    return found if not isinstance(module, nn.Linear) else {}


@contextlib.contextmanager
def _stacks_read(module: nn.Module, calls: Calls) -> Iterator[None]:
    """Within, each stack of a module is read by an operation: once in a forward pass, whose end lets go of it
    (bitsandbytes nn/parametrize.py and PEFT tuners/lora/layer.py cache so).
    """
    names = stacks_of(module)
    if not names:
        yield
        return
    own, run = type(module), module.forward
    held: dict[str, torch.Tensor] = {}
    places: dict[str, int] = {}

    def read(name: str) -> torch.Tensor:
        if not places:
            return module._parameters[name]
        if name not in held:
            held[name] = _read(calls, names[name], module._parameters[name], places[name])
        return held[name]

    def forward(*args: Any, **kwargs: Any) -> Any:
        for name in reversed(names):
            places[name] = calls.stacks
            calls.stacks += 1
            calls.recorder.events.append(("prepare", places[name]))
        if ROUTER not in names.values():
            routed = [one.shape[-1] for one in args if isinstance(one, torch.Tensor) and _counts(one)]
            calls.routed = routed[0] if routed else None
        try:
            return run(*args, **kwargs)
        finally:
            held.clear()
            places.clear()

    properties = {name: property(functools.partial(_read_by, read, name)) for name in names}
    module.__class__ = type(own.__name__, (own,), {"__module__": own.__module__, **properties})
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        module.__class__ = own


def _counts(tensor: torch.Tensor) -> bool:
    """Whether a tensor says which experts tokens go to."""
    return bool(tensor.dtype == torch.int64) and tensor.dim() == 2


def _read_by(read: Callable[[str], torch.Tensor], name: str, module: nn.Module) -> torch.Tensor:
    """A property's getter, for any name."""
    return read(name)


def _read(calls: Calls, name: str, weight: torch.Tensor, place: int) -> torch.Tensor:
    made: torch.Tensor = _Stack.apply(weight, calls.asks, calls, name, place)
    wanted = (ROUTERS,) if name == ROUTER else (EXPERTS, ROUTERS)
    if calls.adapted != NO_STACKS and calls.adapted in wanted:
        return made
    calls.unasked.append(made.grad_fn)
    return made.detach()
