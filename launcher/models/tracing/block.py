"""One run of a block, forward and backward, as operations and the buffers that they make, hold and free."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from launcher.models.tracing.fused import NO_WORK, Work
from launcher.models.tracing.opaque import Call, Calls
from launcher.models.tracing.recorder import OUTSIDE, Recorder
from planner.base.errors import InputError
from planner.models.traced import (
    ALLOCATE,
    FREE,
    NO_VALUE,
    PLAIN,
    PREPARE,
    RUN,
    SAVE,
    STACK,
    WEIGHT,
    Gradient,
    Step,
    TracedOperation,
)

INPUT = 0
"""The number of the block's input among its buffers."""


@dataclass(frozen=True, kw_only=True)
class BlockRun:
    """A pass at one batch and length: as a TracedPass, with sizes in bytes; `inside` is the work of both
    passes within functions that are one operation each.
    """

    buffer_bytes: tuple[int, ...]
    widths: tuple[int, ...]
    steps: tuple[Step, ...]
    operations: tuple[TracedOperation, ...]
    backward_bytes: tuple[tuple[int, ...], ...]
    output: int
    result: int
    inside: tuple[Work, Work] = (NO_WORK, NO_WORK)


@dataclass
class _Node:
    """What is known of one node of the graph."""

    node: Any
    call: int | None
    events: list[tuple[str, int]] = field(default_factory=list)
    gradients: tuple[Gradient | None, ...] = ()


def run_block(
    run: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    outside: list[torch.Tensor],
    calls: Calls,
) -> BlockRun:
    """Run a block on hidden states of that shape.

    Args:
        run: The block's forward pass, its other arguments given.
        hidden: What it is to be given; only its shape counts.
        outside: Tensors that are there before: weights, and the other arguments.
        calls: Where its linear layers and attention are written down.

    Raises:
        InputError: it does something that a trace cannot describe.
    """
    recorder = calls.recorder
    x = torch.empty_like(hidden).requires_grad_()
    recorder.know(outside)
    recorder.know([x], recorder.add(x))
    saves = _Saves(recorder)
    with recorder, torch.autograd.graph.saved_tensors_hooks(saves.pack, saves.unpack):
        output = run(x)
    if not isinstance(output, torch.Tensor) or output.grad_fn is None:
        raise InputError("a block returns something other than hidden states")
    nodes = _graph(output, calls.unasked)
    forward = recorder.events
    saves.find_savers(nodes)
    recorder.events = []
    backward = _Backward(recorder, nodes)
    with recorder, recorder.muted():
        gradient = torch.empty_like(output)
    with recorder:
        backward.run(output, gradient)
    return _described(recorder, calls, nodes, forward, saves, backward, x, output)


class _Saves:
    """What operations save for backward: it is taken from them, so that only the pass's own holds keep it.

    `where` are the events that came before each, `numbers` the buffers.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.where: list[int] = []
        self.numbers: list[int] = []
        self.savers: list[int] = []
        self._like: list[tuple[Any, ...]] = []
        self._asked: list[int] = []

    def pack(self, tensor: torch.Tensor) -> int:
        """Forget a tensor but for its shape."""
        self.where.append(len(self.recorder.events))
        self.numbers.append(self.recorder.number(tensor))
        self._like.append((tensor.shape, tensor.stride(), tensor.dtype))
        return len(self._like) - 1

    def unpack(self, index: int) -> torch.Tensor:
        """A tensor of that shape."""
        self._asked.append(index)
        shape, stride, dtype = self._like[index]
        with self.recorder.muted():
            made = torch.empty_strided(shape, stride, dtype=dtype)
            self.recorder.know([made])
        return made

    def find_savers(self, nodes: list[_Node]) -> None:
        """Ask each node for what it has saved."""
        self.savers = [-1] * len(self._like)
        for number, one in enumerate(nodes):
            self._asked = []
            for name in dir(one.node):
                if name.startswith("_saved_"):
                    getattr(one.node, name)
            if hasattr(one.node, "saved_tensors"):
                one.node.saved_tensors  # noqa: B018  asking unpacks them
            for index in self._asked:
                self.savers[index] = number


class _Backward:
    """What each node's backward pass allocates and frees, and what it hands on."""

    def __init__(self, recorder: Recorder, nodes: list[_Node]) -> None:
        self.recorder, self.nodes = recorder, nodes

    def run(self, output: torch.Tensor, gradient: torch.Tensor) -> None:
        """Run all of them."""
        handles = [hook for one in self.nodes for hook in self._watch(one)]
        self.recorder.in_backward = True
        try:
            torch.autograd.backward(output, gradient)
        finally:
            self.recorder.in_backward = False
            for handle in handles:
                handle.remove()

    def _watch(self, one: _Node) -> Iterator[Any]:
        def before(grads: tuple[Any, ...]) -> None:
            self.recorder.events = []

        def after(found: tuple[Any, ...], given: tuple[Any, ...]) -> None:
            one.events = self.recorder.events
            self.recorder.events = []
            one.gradients = tuple(self._gradient(grad, given) for grad in found)

        yield one.node.register_prehook(before)
        yield one.node.register_hook(after)

    def _gradient(self, grad: Any, given: tuple[Any, ...]) -> Gradient | None:
        if grad is None:
            return None
        number = self.recorder.number(grad)
        for index, incoming in enumerate(given):
            if incoming is not None and self.recorder.number(incoming) == number:
                return Gradient(incoming=index, view=grad is not incoming)
        return Gradient(own=number, view=bool(grad._is_view()))


def _graph(output: torch.Tensor, unasked: list[Any]) -> list[_Node]:
    """The nodes that a backward pass runs, and those of stacks that it does not reach, in the order in which
    forward made them; leaves left out.
    """
    found: dict[Any, None] = dict.fromkeys(unasked)
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in found or hasattr(node, "variable"):
            continue
        found[node] = None
        pending += [following for following, _ in node.next_functions]
    ordered = sorted(found, key=lambda node: node._sequence_nr())
    return [_Node(node=node, call=getattr(node, "call", None)) for node in ordered]


class _Values:
    """Numbers for what flows along the graph's edges."""

    def __init__(self, x: torch.Tensor, calls: Calls) -> None:
        self._known: dict[tuple[Any, int], int] = {}
        self.widths = [x.element_size()]
        self._x, self._asks = x, calls.asks

    def of(self, node: Any, output: int) -> int:
        """The number of a node's output."""
        if (node, output) not in self._known:
            self._known[node, output] = len(self.widths)
            self.widths.append(node._input_metadata[output].dtype.itemsize)
        return self._known[node, output]

    def read_by(self, node: Any) -> tuple[int, ...]:
        """The numbers of a node's inputs."""
        return tuple(self._input(following, index) for following, index in node.next_functions)

    def _input(self, node: Any, output: int) -> int:
        if node is None:
            return NO_VALUE
        if hasattr(node, "variable"):
            if node.variable is self._x:
                return INPUT
            return NO_VALUE if node.variable is self._asks else WEIGHT
        return self.of(node, output)


def _described(
    recorder: Recorder,
    calls: Calls,
    nodes: list[_Node],
    forward: list[tuple[str, int]],
    saves: _Saves,
    backward: _Backward,
    x: torch.Tensor,
    output: torch.Tensor,
) -> BlockRun:
    called = {one.call: number for number, one in enumerate(nodes) if one.call is not None}
    if len(called) != len(calls.found):
        raise InputError("a linear layer or attention has no part in a block's output")
    values = _Values(x, calls)
    operations, backward_bytes = [], []
    for one in nodes:
        unasked = any(one.node is node for node in calls.unasked)
        inputs = () if unasked else values.read_by(one.node)
        outputs = tuple(
            values.of(one.node, index) for index in range(0 if unasked else len(one.node._input_metadata))
        )
        operation, own = _operation(one, inputs, outputs, recorder, calls)
        operations.append(operation)
        backward_bytes.append(own)
    placed = {calls.found[call].place: number for call, number in called.items()}
    steps = _steps(forward, saves, nodes, called, placed)
    made = sorted({INPUT, *(step.number for step in steps if step.action == ALLOCATE), *_made(operations)})
    number = {buffer: index for index, buffer in enumerate(made)}
    return BlockRun(
        buffer_bytes=tuple(recorder.sizes_bytes[buffer] for buffer in made),
        widths=tuple(values.widths),
        steps=tuple(
            step if step.action in (RUN, PREPARE) else step._replace(number=number[step.number])
            for step in steps
        ),
        operations=tuple(_renumbered(operation, number) for operation in operations),
        backward_bytes=tuple(backward_bytes),
        output=number[recorder.number(output)],
        result=values.of(output.grad_fn, output.output_nr),
    )


def _made(operations: list[TracedOperation]) -> Iterator[int]:
    return (operation.makes for operation in operations if operation.makes >= 0)


def _operation(
    one: _Node, inputs: tuple[int, ...], outputs: tuple[int, ...], recorder: Recorder, calls: Calls
) -> tuple[TracedOperation, tuple[int, ...]]:
    """An operation, and the bytes of its backward pass's buffers."""
    if one.call is not None:
        call: Call = calls.found[one.call]
        if OUTSIDE in call.reads:
            raise InputError(f"{call.name} reads what does not come from the block's input")
        operation = TracedOperation(
            kind=call.kind,
            name=call.name,
            inputs=() if call.kind == STACK else inputs[: len(call.reads)],
            outputs=outputs,
            reads=call.reads,
            makes=call.makes,
            shape=call.shape,
        )
        return operation, ()
    number: dict[int, int] = {}
    steps: list[Step] = []
    sizes: list[int] = []
    for action, buffer in one.events:
        if action == ALLOCATE:
            number[buffer] = len(sizes)
            sizes.append(recorder.sizes_bytes[buffer])
        if buffer in number:
            steps.append(Step(action, number[buffer]))
    gradients = tuple(
        None if grad is None else grad if grad.own < 0 else grad._replace(own=number[grad.own])
        for grad in one.gradients
    )
    operation = TracedOperation(
        kind=PLAIN,
        name=type(one.node).__name__.removesuffix("Backward0").lower(),
        inputs=inputs,
        outputs=outputs,
        gradients=gradients if gradients else (None,) * len(inputs),
        backward=tuple(steps),
    )
    return operation, tuple(sizes)


def _renumbered(operation: TracedOperation, number: dict[int, int]) -> TracedOperation:
    if operation.kind == PLAIN:
        return operation
    return replace(
        operation,
        reads=tuple(number[buffer] for buffer in operation.reads),
        makes=number[operation.makes],
    )


def _steps(
    forward: list[tuple[str, int]],
    saves: _Saves,
    nodes: list[_Node],
    called: dict[int, int],
    placed: dict[int, int],
) -> list[Step]:
    """The forward pass in order: each operation runs before its first save, and before any later one."""
    steps: list[Step] = []
    ran = 0

    def run_up_to(number: int) -> None:
        nonlocal ran
        while ran <= number:
            steps.append(Step(RUN, ran))
            ran += 1

    saved = list(zip(saves.where, saves.numbers, saves.savers, strict=True))
    for place, (action, number) in enumerate([*forward, ("end", 0)]):
        while saved and saved[0][0] <= place:
            _, buffer, saver = saved.pop(0)
            if saver >= 0:
                run_up_to(saver)
                if buffer != OUTSIDE:
                    steps.append(Step(SAVE, buffer, saver))
        if action == "call":
            run_up_to(called[number])
        elif action == PREPARE and number in placed:
            steps.append(Step(PREPARE, placed[number]))
        elif action in (ALLOCATE, FREE) and number != INPUT:
            steps.append(Step(action, number))
    run_up_to(len(nodes) - 1)
    return steps


@contextlib.contextmanager
def weights_that_ask(module: torch.nn.Module, *, trained: bool) -> Iterator[None]:
    """Within, a module's weights want gradients or not."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(trained)
    try:
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)
