"""Functions that a fused kernel computes where its package is installed: linear attention, state-space scans,
causal convolutions (transformers integrations/hub_kernels.py). What is traced is transformers' reference in
torch, as one operation: what it keeps, and the most that it has at once in either pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from launcher.models.tracing.recorder import Recorder

_MADE_IN = "hub_kernels.py"


class Work(NamedTuple):
    """Tensors that a pass makes inside such functions, and bytes of them beyond those that their operations
    are recorded with.
    """

    tensors: int
    written_bytes: int

    def plus(self, other: Work) -> Work:
        """These and the others."""
        return Work(self.tensors + other.tensors, self.written_bytes + other.written_bytes)

    def but(self, known_bytes: int) -> Work:
        """The same with so many bytes less, and none less than none."""
        return Work(self.tensors, max(0, self.written_bytes - known_bytes))


NO_WORK = Work(0, 0)


@dataclass
class Called:
    """Such functions that a block's code called in one run: their names, and the work of both passes."""

    names: list[str] = field(default_factory=list)
    forward: Work = NO_WORK
    backward: Work = NO_WORK


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """Bytes that a function keeps for its backward pass and that each pass takes beside what it keeps, the
    indices of inputs and outputs that it saves, its outputs, and what each pass makes in all.
    """

    kept_bytes: int
    forward_bytes: int
    backward_bytes: int
    saved_inputs: tuple[int, ...]
    saved_outputs: tuple[int, ...]
    outputs: list[Any]
    forward: Work
    backward: Work


class _Reference(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """A function as one operation; its buffers are made anew, to be recorded as the block's own."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., list[Any]], recorder: Recorder, called: Called, *inputs: Any
    ) -> Any:
        with recorder.muted():
            cost = _cost(run, inputs, ctx.needs_input_grad[3:])
        called.forward = called.forward.plus(cost.forward)
        called.backward = called.backward.plus(cost.backward)
        kept = torch.empty(cost.kept_bytes, dtype=torch.uint8)
        made = tuple(torch.empty_like(one) for one in cost.outputs)
        torch.empty(cost.forward_bytes, dtype=torch.uint8)
        ctx.save_for_backward(
            kept, *(inputs[i] for i in cost.saved_inputs), *(made[i] for i in cost.saved_outputs)
        )
        ctx.cost, ctx.like = cost.backward_bytes, [(one.shape, one.dtype) for one in inputs]
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        torch.empty(ctx.cost, dtype=torch.uint8)
        asked = zip(ctx.needs_input_grad[3:], ctx.like, strict=True)
        return (
            None,
            None,
            None,
            *(torch.empty(shape, dtype=dtype) if ask else None for ask, (shape, dtype) in asked),
        )


def _cost(run: Callable[..., list[Any]], inputs: tuple[Any, ...], asked: Sequence[bool]) -> _Cost:
    """Run both passes by themselves; what is saved depends on which inputs want gradients."""
    recorder = Recorder()
    saved: set[int] = set()
    own = [one.detach().requires_grad_(ask) for one, ask in zip(inputs, asked, strict=True)]
    for one in own:
        recorder.add(one)

    def pack(tensor: Any) -> Any:
        saved.add(recorder.number(tensor))
        return tensor

    with torch.enable_grad(), recorder, torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        outputs = run(*own)
    highest, live = _course(recorder, 0)
    outputs_bytes = sum(one.untyped_storage().nbytes() for one in outputs)
    forward = _made(recorder)
    recorder.events = []
    asking = [one for one in outputs if one.requires_grad]
    grads = [torch.empty_like(one) for one in asking]
    recorder.know(grads)
    recorder.in_backward = True
    with recorder:
        found = torch.autograd.grad(
            asking, [one for one in own if one.requires_grad], grads, allow_unused=True
        )
    most, _ = _course(recorder, 0)
    backward = _made(recorder)
    handed = sum(one.untyped_storage().nbytes() for one in found if one is not None)
    del found
    kept, beside = max(0, live - outputs_bytes), max(0, highest - live)
    return _Cost(
        kept_bytes=kept,
        forward_bytes=beside,
        backward_bytes=most,
        forward=forward.but(kept + beside + outputs_bytes),
        backward=backward.but(most + handed),
        saved_inputs=tuple(i for i, one in enumerate(own) if recorder.number(one) in saved),
        saved_outputs=tuple(i for i, one in enumerate(outputs) if recorder.number(one) in saved),
        outputs=[one.detach() for one in outputs],
    )


def _made(recorder: Recorder) -> Work:
    """What a recorder's events make."""
    made = [recorder.sizes_bytes[number] for action, number in recorder.events if action == "allocate"]
    return Work(len(made), sum(made))


def _course(recorder: Recorder, live: int) -> tuple[int, int]:
    """The most bytes alive over a recorder's events, and those alive in the end."""
    most = live
    for action, number in recorder.events:
        live += recorder.sizes_bytes[number] * (1 if action == "allocate" else -1)
        most = max(most, live)
    return most, live


@contextlib.contextmanager
def fused_as_one(block: nn.Module, recorder: Recorder) -> Iterator[Called]:
    """Within, each such function that a block's code calls is one operation; yields those called."""
    called = Called()
    changed = []
    for home in {sys.modules[type(module).__module__] for module in block.modules()}:
        for name, function in list(vars(home).items()):
            code = getattr(function, "__code__", None)
            if code is not None and code.co_filename.endswith(_MADE_IN) and hasattr(function, "__wrapped__"):
                setattr(home, name, _as_one(function.__wrapped__, name, recorder, called))
                changed.append((home, name, function))
    try:
        yield called
    finally:
        for home, name, function in changed:
            setattr(home, name, function)


def _as_one(
    function: Callable[..., Any], name: str, recorder: Recorder, called: Called
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        called.names.append(name.removeprefix("torch_"))
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        returned: list[Any] = []

        def on_tensors(*tensors: Any) -> list[Any]:
            given = dict(zip(places, tensors, strict=True))
            own_args, own_kwargs = tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
            found, shape = tree_flatten(function(*own_args, **own_kwargs))
            returned[:] = [found, shape]
            return [one for one in found if isinstance(one, torch.Tensor)]

        made = iter(_Reference.apply(on_tensors, recorder, called, *(leaves[i] for i in places)))
        found, shape = returned
        return tree_unflatten([next(made) if isinstance(one, torch.Tensor) else one for one in found], shape)

    return run
