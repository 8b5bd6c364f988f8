"""A traced block on the tape: its recorded operations, and the memory model's own for what is not recorded.

What was recorded is one pass whose operations all want gradients. On the tape each wants one, and saves what
it was seen to save, only where something asks: nothing asks for that of what comes before the first adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from planner.memory.layers.attention import attend, hands_back_by_heads
from planner.memory.layers.base_weight import LinearKind, weight_gradient
from planner.memory.layers.experts import multiply_sliced, read_stack, register_stack
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.layers.linear import early_gradients, linear
from planner.memory.tape.tape import ACTIVATIONS, GRADIENTS, WORKSPACE, Buffer, Size, Tape, Value
from planner.models.spec import LayerSpec
from planner.models.traced import (
    ALLOCATE,
    ATTENTION,
    EXPERTS,
    FREE,
    LINEAR,
    NO_STACKS,
    NO_VALUE,
    PREPARE,
    ROUTER,
    ROUTERS,
    SAVE,
    STACK,
    WEIGHT,
    Gradient,
    TracedBlock,
    TracedOperation,
    TracedPass,
)
from planner.setup.trained import expert_rank

INPUT = 0


def traced_pass(block: TracedBlock, layer: LayerSpec, knobs: LayerKnobs) -> TracedPass:
    """The pass that was recorded for such knobs."""
    kind = knobs.default
    method = "full" if kind.trained else "qlora" if kind.quantized else "lora"
    by_heads = hands_back_by_heads(layer, knobs.attention)
    adapted = ROUTERS if knobs.kind(ROUTER).rank else EXPERTS if knobs.kind(EXPERTS).rank else NO_STACKS
    kernel = layer.attention_sinks and knobs.attention == "flex"
    return block.pass_of(method, kind.compute_width, heads_first=by_heads, adapted=adapted, kernel=kernel)


def run_traced(tape: Tape, block: TracedBlock, layer: LayerSpec, knobs: LayerKnobs, hidden: Value) -> Value:
    """Put a traced block on the tape, both passes. The caller keeps its hold on `hidden`."""
    return _Replay(tape, traced_pass(block, layer, knobs), layer, knobs, hidden).run()


def saves_input(block: TracedPass) -> bool:
    """Whether an operation saves the block's input itself."""
    return any(step.action == SAVE and step.number == INPUT for step in block.steps)


def gradients_before_saved(block: TracedPass, layer: LayerSpec, knobs: LayerKnobs) -> list[float]:
    """Bytes a token of gradients that are there when backward first asks for a saved tensor: the incoming
    one, and those that the operations before make of it.
    """
    saving = {step.operation for step in block.steps if step.action == SAVE}
    found = [float(layer.hidden_size * block.widths[block.result])]
    for number in range(len(block.operations) - 1, -1, -1):
        operation = block.operations[number]
        if operation.kind == LINEAR:
            width = block.widths[operation.outputs[0]]
            return found + early_gradients(knobs.kind(operation.name), operation.shape[1], width)
        if number in saving or operation.kind == ATTENTION:
            break
        if operation.kind == STACK:
            continue
        kept = {one.own for one in operation.gradients if one is not None and one.own >= 0}
        found += [block.sizes[operation.buffers[own]][1] for own in sorted(kept)]
    return found


class _Replay:
    """One pass while it is played."""

    def __init__(
        self, tape: Tape, block: TracedPass, layer: LayerSpec, knobs: LayerKnobs, hidden: Value
    ) -> None:
        self.tape, self.block, self.layer, self.knobs = tape, block, layer, knobs
        self.buffers: dict[int, Buffer | None] = {INPUT: hidden.buffer}
        self.values: dict[int, Value] = {INPUT: hidden}
        self.saved: dict[int, list[Buffer | None]] = {}
        self.sliced = _products_of_stacks(block) if knobs.kind(EXPERTS).sliced else {}

    def run(self) -> Value:
        """Play the forward pass."""
        tape, block = self.tape, self.block
        for action, number, operation in block.steps:
            if action == ALLOCATE:
                self.buffers[number] = tape.allocate(self._size(block.buffers[number]))
            elif action == FREE:
                tape.free(self.buffers[number])
            elif action == SAVE:
                self._save(number, operation)
            elif action == PREPARE:
                self._prepare(block.operations[number])
            else:
                self._operate(number, block.operations[number])
        tape.leave_layer()
        result = self.values[block.result]
        result.buffer = self._buffer(block.output)
        return result

    def _buffer(self, number: int) -> Buffer:
        """A buffer that an operation reads or makes."""
        found = self.buffers[number]
        assert found is not None, "a stack that is used as it lies is no operation's input"
        return found

    def _save(self, number: int, operation: int) -> None:
        """An operation saves a buffer, where it has a backward pass; a stack that is used as it lies is there
        anyway.
        """
        buffer = self.buffers[number]
        if buffer is not None and self._asks(self.block.operations[operation]):
            self.saved[operation].append(self.tape.save(buffer))

    def _size(self, index: int) -> Size:
        return Size(*self.block.sizes[index])

    def _asks(self, operation: TracedOperation) -> bool:
        """Whether an operation has a backward pass."""
        return any(
            number == WEIGHT or (number >= 0 and self.values[number].requires_grad)
            for number in operation.inputs
        )

    def _operate(self, number: int, operation: TracedOperation) -> None:
        if operation.kind == LINEAR:
            x = self._read(operation.inputs[0], operation.reads[0])
            made = linear(self.tape, self.knobs.kind(operation.name), x, *operation.shape)
            self._make(operation, made)
        elif operation.kind == ATTENTION:
            parts = [self._read(*one) for one in zip(operation.inputs, operation.reads, strict=True)]
            made = attend(self.tape, self.layer, self.knobs, parts[0], parts[1], parts[2])
            self._make(operation, made)
        elif operation.kind == STACK:
            self._read_stack(operation)
        else:
            self._multiply(number)
            self._plain(number, operation)

    def _multiply(self, number: int) -> None:
        """An operation multiplies with a stack that is dequantised within it."""
        if number in self.sliced:
            shape = self.sliced[number]
            multiply_sliced(self.tape, self.knobs.kind(EXPERTS), shape[0], math.prod(shape))

    def _read(self, number: int, buffer: int) -> Value:
        """A value as an operation reads it."""
        if number < 0:
            return Value(self._buffer(buffer), False, self.knobs.default.compute_width)
        value = self.values[number]
        value.buffer = self._buffer(buffer)
        return value

    def _stack_kind(self, operation: TracedOperation) -> LinearKind:
        """How a stack is held, and its adapter's rank: experts have their own, a router is in 16 bits."""
        if operation.name == ROUTER:
            return replace(self.knobs.kind(ROUTER), quantized=False)
        kind = self.knobs.kind(EXPERTS)
        return replace(kind, rank=expert_rank(operation.name, kind.rank))

    def _prepare(self, operation: TracedOperation) -> None:
        """A module begins that will read a stack of experts (a router's product is computed before)."""
        if operation.name != ROUTER:
            register_stack(self.tape, self._stack_kind(operation), math.prod(operation.shape))

    def _read_stack(self, operation: TracedOperation) -> None:
        kind, elements = self._stack_kind(operation), math.prod(operation.shape)
        buffer = read_stack(self.tape, kind, elements)
        self.buffers[operation.makes] = buffer
        if buffer is None or not operation.outputs:
            return
        value = self.values[operation.outputs[0]] = Value(buffer, True, kind.compute_width)
        trained = kind.rank * adapter_widths(operation.shape)

        def backward() -> None:
            grad = self.tape.take_grad(value)
            weight_gradient(self.tape, kind, trained, kind.adapter_width)
            self.tape.free(grad)

        self.tape.nodes.append(backward)

    def _make(self, operation: TracedOperation, made: Value) -> None:
        self.buffers[operation.makes] = made.buffer
        self.values[operation.outputs[0]] = made

    def _plain(self, number: int, operation: TracedOperation) -> None:
        asks = self._asks(operation)
        for output in operation.outputs:
            # Its buffer is known where something reads it.
            self.values[output] = Value(self._buffer(INPUT), asks, self.block.widths[output])
        if asks:
            self.saved[number] = []
            self.tape.nodes.append(self._backward(number, operation))

    def _backward(self, number: int, operation: TracedOperation) -> Callable[[], None]:
        def backward() -> None:
            tape = self.tape
            outputs = [self.values[output] for output in operation.outputs]
            views = [value.grad_is_view for value in outputs]
            given = [None if value.grad is None else tape.take_grad(value) for value in outputs]
            saved = self.saved.pop(number)
            if all(one is None for one in given):
                tape.free(*saved)
                return
            own = self._allocations(operation)
            self._multiply(number)
            handed = [self._held(gradient, own, given) for gradient in operation.gradients]
            tape.free(*own.values(), *saved, *given)
            for value, gradient, buffer in zip(operation.inputs, operation.gradients, handed, strict=True):
                if gradient is None or buffer is None:
                    continue
                if value == NO_VALUE:
                    # torch.cat's backward has gradients of all its parts, asked for or not.
                    tape.free(buffer)
                    continue
                if value == WEIGHT:
                    self._hand_to_weight(buffer)
                    continue
                view = gradient.view or (gradient.incoming >= 0 and views[gradient.incoming])
                tape.add_grad(self.values[value], buffer, view=view)

        return backward

    def _hand_to_weight(self, buffer: Buffer) -> None:
        """A weight takes over the gradient of what was made of it, as its own."""
        tape, kind = self.tape, self.knobs.default
        size = Size(buffer.constant, buffer.per_token, buffer.per_score)
        tape.free(buffer)
        kept = tape.allocate(size, _category(kind, weight=True))
        if kind.accumulating:
            tape.free(kept)

    def _held(
        self, gradient: Gradient | None, own: dict[int, Buffer], given: list[Buffer | None]
    ) -> Buffer | None:
        """What an input is handed: a buffer of the operation's own or its output's gradient, held again."""
        if gradient is None:
            return None
        found = own.get(gradient.own) if gradient.incoming < 0 else given[gradient.incoming]
        if found is not None:
            found.holders += 1
        return found

    def _allocations(self, operation: TracedOperation) -> dict[int, Buffer]:
        """What an operation's backward pass allocates; returned is what it still holds when it ends."""
        tape, kind = self.tape, self.knobs.default
        weights = {
            gradient.own
            for value, gradient in zip(operation.inputs, operation.gradients, strict=True)
            if value == WEIGHT and gradient is not None
        }
        own: dict[int, Buffer] = {}
        for action, number, _ in operation.backward:
            if action == ALLOCATE:
                own[number] = tape.allocate(
                    self._size(operation.buffers[number]), _category(kind, weight=number in weights)
                )
            else:
                tape.free(own.pop(number))
        kept = {number: own.pop(number) for number in sorted(weights & own.keys())}
        if kind.accumulating:
            tape.free(*kept.values())
        return own


def _products_of_stacks(block: TracedPass) -> dict[int, tuple[int, ...]]:
    """Operations that save a stack of experts, with its shape: their backward passes multiply with it too."""
    stacks = {one.makes: one.shape for one in block.operations if one.kind == STACK and one.name != ROUTER}
    saves = (step for step in block.steps if step.action == SAVE and step.number in stacks)
    return {step.operation: stacks[step.number] for step in saves}


def adapter_widths(shape: Sequence[int]) -> int:
    """Elements of a stack's adapter a rank: what goes in and out of each of its matrices."""
    return math.prod(shape[:-2]) * (shape[-2] + shape[-1])


def _category(kind: LinearKind, *, weight: bool) -> int:
    """Where a buffer of a backward pass is counted: a weight's gradient stays, unless it is added to one."""
    if not weight:
        return ACTIVATIONS
    return WORKSPACE if kind.accumulating else GRADIENTS
