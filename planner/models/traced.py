"""Traced blocks: what a decoder layer that nobody has read does, as it was recorded while it ran.

A recipe (`LayerSpec`) says in a few words what a layer computes, and planner/memory/decoder/layer.py knows
the rest. A traced pass says all of it: which buffers the layer's forward pass makes and lets go of, which of
them each operation holds for its backward pass, and what that allocates. Linear layers, attention and the
reading of stacked experts and routers are named and not recorded: how they are held, adapted and computed is
the setup's business, and the memory model's own operations are played for them
(planner/memory/traced/replay.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.values import dataclass

ALLOCATE, FREE, SAVE, RUN, PREPARE = "allocate", "free", "save", "run", "prepare"
ACTIONS = (ALLOCATE, FREE, SAVE, RUN, PREPARE)
PLAIN, LINEAR, ATTENTION, STACK = "plain", "linear", "attention", "stack"
KINDS = (PLAIN, LINEAR, ATTENTION, STACK)
WEIGHT = -1
"""The value whose gradient is a trained weight's."""
NO_VALUE = -2
"""An input that wants no gradient."""
METHODS = ("qlora", "lora", "full")
NO_STACKS, EXPERTS, ROUTERS = "none", "experts", "routers"
ADAPTED = (NO_STACKS, EXPERTS, ROUTERS)
"""Which stacks a pass was recorded with adapters on: none, the experts', the routers' as well."""
ROUTER = "router"
"""The name of a router's weight among stacks; those of experts go by their parameter's."""

BufferBytes = tuple[float, float, float]
"""Bytes of a buffer: constant, a token, a score element (batch * length^2 of them)."""


class Step(NamedTuple):
    """One step of a pass: a buffer is allocated, freed, or saved by an operation; an operation runs; or a
    module begins that will read a stack.

    `number` is the buffer, of RUN and PREPARE the operation; `operation` is who saves.
    """

    action: str
    number: int
    operation: int = -1


class Gradient(NamedTuple):
    """Where an operation's backward pass has an input's gradient: in a buffer of its own, or in the gradient
    of its output of that number. `view` says that another tensor of the same memory is alive beside it, so
    that a second gradient is not added in place.
    """

    own: int = -1
    incoming: int = -1
    view: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedOperation:
    """One operation with a backward pass.

    `inputs` are the values it computes gradients for (WEIGHT for a trained weight, NO_VALUE for none),
    `outputs` the values it makes, `gradients` what it hands to each input (null: none). `backward` allocates
    and frees buffers of its own, whose sizes (indices into the pass's) are `buffers`.
    Of a LINEAR operation `name` is the module's, `reads` and `makes` are the buffers of its input and output,
    `shape` its inputs and outputs; of an ATTENTION one `reads` are queries, keys and values. A STACK one
    reads a stack of experts' weights, or a router's, of that `shape`: it has an output where its pass was
    recorded with an adapter on it.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    gradients: tuple[Gradient | None, ...] = ()
    buffers: tuple[int, ...] = ()
    backward: tuple[Step, ...] = ()
    reads: tuple[int, ...] = ()
    makes: int = -1
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        validate.choice("operation kind", self.kind, KINDS)
        if self.kind == PLAIN and len(self.gradients) != len(self.inputs):
            raise FieldError(f"{self.name} gradients", len(self.gradients), f"{len(self.inputs)}, its inputs")
        if self.kind == LINEAR and (len(self.reads), len(self.shape)) != (1, 2):
            raise FieldError(f"{self.name} shape", self.shape, "inputs and outputs")
        if self.kind == ATTENTION and len(self.reads) != 3:
            raise FieldError(f"{self.name} reads", self.reads, "queries, keys and values")
        if self.kind == STACK and len(self.shape) not in (2, 3):
            raise FieldError(f"{self.name} shape", self.shape, "that of a stack of experts or of a router")


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedPass:
    """A block's forward pass with all that its backward pass will do.

    `sizes` are the distinct sizes of buffers, `buffers` the index of each forward buffer's (buffer 0 is the
    block's input, which its caller holds), `widths` bytes of an element of each value (value 0 is the
    input). `steps` is the forward pass in order. `output` is the buffer that it leaves, `result` its value.
    """

    sizes: tuple[BufferBytes, ...]
    buffers: tuple[int, ...]
    widths: tuple[int, ...]
    steps: tuple[Step, ...]
    operations: tuple[TracedOperation, ...]
    output: int
    result: int

    def __post_init__(self) -> None:
        for step in self.steps:
            validate.choice("step action", step.action, ACTIONS)
        if not 0 <= self.output < len(self.buffers) or not 0 <= self.result < len(self.widths):
            raise FieldError("traced output", self.output, "one of the pass's buffers, with a value")

    @property
    def linears(self) -> tuple[TracedOperation, ...]:
        """Its linear layers."""
        return tuple(operation for operation in self.operations if operation.kind == LINEAR)


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedWay:
    """For which setups a pass was recorded: the method, bytes of an element that is computed with, whether
    attention hands gradients back head by head, and which stacks have adapters; `number` is the pass. Of
    attention with sinks the module's own code was recorded, or with `kernel` it was left to one.
    """

    method: str
    width: int
    heads_first: bool
    number: int
    adapted: str = NO_STACKS
    kernel: bool = False

    def __post_init__(self) -> None:
        validate.choice("traced method", self.method, METHODS)
        validate.choice("traced adapted", self.adapted, ADAPTED)
        validate.integer("traced width", self.width, minimum=1, maximum=8)


class LoopWork(NamedTuple):
    """What a pass launches and writes inside functions that are one operation each, beside what that
    operation is counted for: tensors made whatever the length, those for each position of a row, and bytes.
    """

    launches: float
    per_position: float
    written: BufferBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedLoops:
    """The reference in torch of functions that a fused kernel may compute, in both passes of a block."""

    forward: LoopWork
    backward: LoopWork


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedBlock:
    """What was recorded of one kind of block. `unseen` names what a trace on a CPU cannot see of it, of which
    `loops` are transformers' reference in torch.
    """

    passes: tuple[TracedPass, ...]
    ways: tuple[TracedWay, ...]
    unseen: tuple[str, ...] = ()
    loops: TracedLoops | None = None

    def __post_init__(self) -> None:
        for way in self.ways:
            validate.integer("traced pass", way.number, minimum=0, maximum=len(self.passes) - 1)

    def pass_of(
        self, method: str, width: int, *, heads_first: bool, adapted: str = NO_STACKS, kernel: bool = False
    ) -> TracedPass:
        """The pass that was recorded for such setups; a block without stacks, or without attention that has
        sinks, has one for all of them.

        Raises:
            InputError: none was.
        """
        asked = (method, width, heads_first, kernel and self.leaves_to_kernel)
        found = {
            way.adapted: way.number
            for way in self.ways
            if (way.method, way.width, way.heads_first, way.kernel) == asked
        }
        for wanted in dict.fromkeys((adapted, NO_STACKS) if len(found) == 1 else (adapted,)):
            if wanted in found:
                return self.passes[found[wanted]]
        raise InputError(f"the model was not traced for method {method} in elements of {width} bytes")

    @property
    def leaves_to_kernel(self) -> bool:
        """Whether its attention with sinks was also recorded as a kernel's."""
        return any(way.kernel for way in self.ways)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TracedBlock:
        """Read the JSON form, that of dataclasses.asdict."""
        return cls(
            passes=tuple(_pass(one) for one in values["passes"]),
            ways=tuple(TracedWay(**one) for one in values["ways"]),
            unseen=tuple(values["unseen"]),
            loops=_loops(values.get("loops")),
        )


def _loops(values: Mapping[str, Any] | None) -> TracedLoops | None:
    if values is None:
        return None
    return TracedLoops(**{name: _loop_work(*work) for name, work in values.items()})


def _loop_work(launches: float, per_position: float, written: Sequence[float]) -> LoopWork:
    constant, per_token, per_score = map(float, written)
    return LoopWork(float(launches), float(per_position), (constant, per_token, per_score))


def _pass(values: Mapping[str, Any]) -> TracedPass:
    return TracedPass(
        sizes=tuple((float(a), float(b), float(c)) for a, b, c in values["sizes"]),
        buffers=tuple(values["buffers"]),
        widths=tuple(values["widths"]),
        steps=tuple(Step(*one) for one in values["steps"]),
        operations=tuple(_operation(one) for one in values["operations"]),
        output=values["output"],
        result=values["result"],
    )


def _operation(values: Mapping[str, Any]) -> TracedOperation:
    own: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list | tuple) else value for key, value in values.items()
    }
    own["gradients"] = tuple(None if one is None else Gradient(*one) for one in own["gradients"])
    own["backward"] = tuple(Step(*one) for one in own["backward"])
    return TracedOperation(**own)
