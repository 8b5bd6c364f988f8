"""A tape of allocations: replays what a decoder layer allocates and frees, forward and backward.

Every size is linear in the tokens of a micro-step and in the attention-score elements, so one replay of a
layer gives its peak for every length and batch: the largest of the recorded moments. The order of
allocations and frees is the order of torch's autograd engine, checked against allocation traces of real
steps (tests/stack/test_traces.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

ACTIVATIONS = 0
WORKSPACE = 1
GRADIENTS = 2
CATEGORIES = ("activations", "workspace", "gradients")


class Size(NamedTuple):
    """Bytes as constant + tokens * per_token + scores * per_score.

    `scores` counts batch * length^2, the elements of one attention matrix per head.
    """

    constant: float = 0.0
    per_token: float = 0.0
    per_score: float = 0.0

    def at(self, tokens: int, scores: int) -> float:
        """Bytes for a micro-step of that many tokens and score elements."""
        return self.constant + tokens * self.per_token + scores * self.per_score


Moment = tuple[Size, Size, Size]
"""Live bytes of a moment, by category (activations, workspace, gradients)."""


class Buffer:
    """One allocation; freed when the last holder lets go."""

    __slots__ = ("category", "holders", "size")

    def __init__(self, size: Size, category: int) -> None:
        self.size = size
        self.category = category
        self.holders = 1


class Value:
    """A tensor of the replayed program: its buffer, and the gradient that backward collects for it."""

    __slots__ = ("buffer", "grad", "grad_is_view", "requires_grad")

    def __init__(self, buffer: Buffer, requires_grad: bool) -> None:
        self.buffer = buffer
        self.requires_grad = requires_grad
        self.grad: Buffer | None = None
        self.grad_is_view = False


class Tape:
    """Live bytes over a replay, its backward nodes, and the moments worth keeping."""

    def __init__(self, *, saves: bool) -> None:
        self.saves = saves
        self.nodes: list[Callable[[], None]] = []
        self._live = [[0.0, 0.0, 0.0] for _ in CATEGORIES]
        self._moments: list[Moment] = []
        self._last_save = 0

    def allocate(self, size: Size, category: int = ACTIVATIONS) -> Buffer:
        """Allocate a buffer and note the moment."""
        live = self._live[category]
        live[0] += size.constant
        live[1] += size.per_token
        live[2] += size.per_score
        self._moments.append(self.live)
        return Buffer(size, category)

    def tokens(self, per_token: float, category: int = ACTIVATIONS) -> Buffer:
        """Allocate a buffer of so many bytes a token."""
        return self.allocate(Size(per_token=per_token), category)

    def fixed(self, size_bytes: float, category: int = WORKSPACE) -> Buffer:
        """Allocate a buffer whose size does not depend on the batch."""
        return self.allocate(Size(constant=size_bytes), category)

    def free(self, *buffers: Buffer | None) -> None:
        """Let go of buffers; one is freed when its last holder does."""
        for buffer in buffers:
            if buffer is None:
                continue
            buffer.holders -= 1
            if buffer.holders == 0:
                live = self._live[buffer.category]
                live[0] -= buffer.size.constant
                live[1] -= buffer.size.per_token
                live[2] -= buffer.size.per_score

    def save(self, buffer: Buffer) -> Buffer | None:
        """Hold a buffer for backward, when this replay saves at all."""
        if not self.saves:
            return None
        buffer.holders += 1
        self._last_save = len(self._moments)
        return buffer

    def add_grad(self, value: Value, grad: Buffer, *, view: bool = False) -> None:
        """Collect a gradient; takes over the caller's hold on `grad`.

        torch adds into the first gradient in place unless that one is a view of a matrix product's output,
        in which case the sum is a new tensor (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace).
        """
        if not value.requires_grad:
            self.free(grad)
        elif value.grad is None:
            value.grad = grad
            value.grad_is_view = view
        elif value.grad_is_view:
            total = self.allocate(value.grad.size)
            self.free(value.grad, grad)
            value.grad = total
            value.grad_is_view = False
        else:
            self.free(grad)

    def backward(self) -> None:
        """Run the recorded nodes, last first."""
        while self.nodes:
            self.nodes.pop()()

    def take_grad(self, value: Value) -> Buffer:
        """Hand the collected gradient of a value to its node."""
        grad = value.grad
        if grad is None:
            raise AssertionError("a node ran before its output had a gradient")
        value.grad = None
        return grad

    def stop_after_last_save(self) -> None:
        """Forget moments after the last saved tensor: recomputation in a checkpoint stops there.

        torch.utils.checkpoint's early stop (torch/utils/checkpoint.py, _StopRecomputationError).
        """
        del self._moments[self._last_save :]

    def forget_moments(self) -> None:
        """Start a new pass: earlier moments are reported already."""
        self._moments = [self.live]
        self._last_save = 0

    @property
    def live(self) -> Moment:
        """What is live now, by category."""
        a, b, c = self._live
        return Size(*a), Size(*b), Size(*c)

    def moments(self) -> tuple[Moment, ...]:
        """The recorded moments that can be a peak for some length and batch."""
        return prune(self._moments)


def total(moment: Moment) -> Size:
    """All categories of a moment together."""
    a, b, c = moment
    return Size(a[0] + b[0] + c[0], a[1] + b[1] + c[1], a[2] + b[2] + c[2])


def prune(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """Drop the moments that another one exceeds in every coefficient."""
    kept: list[tuple[Size, Moment]] = []
    for size, moment in sorted(((total(m), m) for m in moments), reverse=True):
        if not any(
            size.constant <= k.constant and size.per_token <= k.per_token and size.per_score <= k.per_score
            for k, _ in kept
        ):
            kept.append((size, moment))
    return tuple(moment for _, moment in kept)
