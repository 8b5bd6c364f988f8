"""A tape of allocations: what a decoder layer allocates and frees, forward and backward.

Every size is linear in the tokens of a micro-step and in the attention-score elements, so one tape of a
layer gives its peak for every length and batch: the largest of the recorded moments. The order of
allocations and frees is the order of torch's autograd engine, checked against allocation traces of real
steps (tests/stack/test_traces.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
_COEFFICIENTS = 3 * len(CATEGORIES)


class Moments(tuple[Moment, ...]):
    """Moments of a pass; `totals` are their bytes of all categories (constant, per token, per score), each
    with its moment.
    """

    totals: tuple[tuple[float, float, float, Moment], ...]

    def __new__(cls, moments: Iterable[Moment] = ()) -> Moments:
        """Add them up once: a file of setups asks for the largest of them tens of thousands of times."""
        made = super().__new__(cls, moments)
        made.totals = tuple(
            (a[0] + b[0] + c[0], a[1] + b[1] + c[1], a[2] + b[2] + c[2], (a, b, c)) for a, b, c in made
        )
        return made


class Buffer:
    """One allocation; freed when the last holder lets go."""

    __slots__ = ("constant", "holders", "per_score", "per_token", "saves", "slot")

    def __init__(self, constant: float, per_token: float, per_score: float, slot: int) -> None:
        self.constant = constant
        self.per_token = per_token
        self.per_score = per_score
        self.slot = slot
        self.holders = 1
        self.saves = 0


class Value:
    """A tensor on the tape: its buffer, the gradient that backward collects for it, and the bytes
    of one of its elements (0 while nobody has to know).
    """

    __slots__ = ("buffer", "grad", "grad_is_view", "requires_grad", "width")

    def __init__(self, buffer: Buffer, requires_grad: bool, width: int = 0) -> None:
        self.buffer = buffer
        self.requires_grad = requires_grad
        self.width = width
        self.grad: Buffer | None = None
        self.grad_is_view = False


class Tape:
    """Live bytes over a tape, its backward nodes, and the moments worth keeping.

    A moment is noted where a free follows an allocation: only there can live memory have been at its most.
    """

    logs = False
    """Whether the tape writes down events for the allocator's replay."""

    def __init__(self, *, saves: bool, recomputes: bool = False) -> None:
        self.saves = saves
        self.recomputes = recomputes
        """Whether backward takes what is saved from a checkpoint."""
        self.nodes: list[Callable[[], None]] = []
        self._live = [0.0] * _COEFFICIENTS
        self._moments: list[tuple[float, ...]] = []
        self._rising = False
        self._last_save = 0
        self._shared: list[Buffer] = []
        self._held_in_layer: list[Buffer] = []

    def allocate(self, size: Size, category: int = ACTIVATIONS) -> Buffer:
        """Allocate a buffer."""
        return self._take(size.constant, size.per_token, size.per_score, 3 * category)

    def tokens(self, per_token: float, category: int = ACTIVATIONS) -> Buffer:
        """Allocate a buffer of so many bytes a token."""
        slot = 3 * category
        self._live[slot + 1] += per_token
        self._rising = True
        return Buffer(0.0, per_token, 0.0, slot)

    def fixed(self, size_bytes: float, category: int = WORKSPACE) -> Buffer:
        """Allocate a buffer whose size does not depend on the batch."""
        return self._take(size_bytes, 0.0, 0.0, 3 * category)

    def _take(self, constant: float, per_token: float, per_score: float, slot: int) -> Buffer:
        live = self._live
        live[slot] += constant
        live[slot + 1] += per_token
        live[slot + 2] += per_score
        self._rising = True
        return Buffer(constant, per_token, per_score, slot)

    def product(self) -> None:
        """A matrix product runs, its output there."""

    def by_operator(self, buffer: Buffer, *, inner: bool) -> None:
        """A buffer of a compiled graph that an operator allocates which inductor does not generate: its
        output, or an `inner` one.
        """

    def in_single(self, buffer: Buffer) -> None:
        """A buffer of a compiled graph is in fp32 rather than the compute dtype."""

    def free(self, *buffers: Buffer | None) -> None:
        """Let go of buffers; one is freed when its last holder does."""
        live = self._live
        for buffer in buffers:
            if buffer is None:
                continue
            if buffer.holders > 1:
                buffer.holders -= 1
                continue
            if self._rising:
                self._moments.append(tuple(live))
                self._rising = False
            slot = buffer.slot
            live[slot + 1] -= buffer.per_token
            if buffer.constant:
                live[slot] -= buffer.constant
            if buffer.per_score:
                live[slot + 2] -= buffer.per_score

    def _note(self) -> None:
        if self._rising:
            self._moments.append(tuple(self._live))
            self._rising = False

    def save(self, buffer: Buffer) -> Buffer | None:
        """Hold a buffer for backward, when this tape saves at all."""
        if not self.saves:
            return None
        buffer.holders += 1
        buffer.saves += 1
        if buffer.saves == 2:
            self._shared.append(buffer)
        self._note()
        self._last_save = len(self._moments)
        return buffer

    def save_twice(self, buffer: Buffer) -> Buffer | None:
        """Hold a buffer once for two nodes that save it: a square and a product, in a norm."""
        saved = self.save(buffer)
        if saved is not None:
            self.free(self.save(buffer))
        return saved

    def hold_in_layer(self, buffer: Buffer) -> None:
        """Take over a hold that a layer's forward lets go when it returns."""
        self._held_in_layer.append(buffer)

    def leave_layer(self) -> None:
        """The layer's forward returns."""
        held, self._held_in_layer = self._held_in_layer, []
        self.free(*held)

    def select(self, *buffers: Buffer) -> None:
        """Name what selective checkpointing keeps; planner/memory/decoder/program.py reads it."""

    def cast_weights(self, *sizes_bytes: float) -> tuple[Buffer, ...]:
        """Copies of weights in the compute dtype that autocast makes; kept for backward.

        Those of a pass that saves nothing are let go here; autocast holds them until the forward pass ends,
        which planner/memory/decoder/program.py reads.
        """
        copies = tuple(self.fixed(size) for size in sizes_bytes)
        if self.saves:
            return copies
        self.free(*copies)
        return ()

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
            held = value.grad
            total = self._take(held.constant, held.per_token, held.per_score, held.slot)
            self.free(held, grad)
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
        self._rising = False

    def forget_moments(self) -> None:
        """Start a new pass: earlier moments are reported already."""
        self._moments = [tuple(self._live)]
        self._rising = False
        self._last_save = 0

    @property
    def shared(self) -> Moment:
        """What more than one node has saved, by category."""
        values = [0.0] * _COEFFICIENTS
        for buffer in self._shared:
            values[buffer.slot] += buffer.constant
            values[buffer.slot + 1] += buffer.per_token
            values[buffer.slot + 2] += buffer.per_score
        return _moment(values)

    @property
    def live(self) -> Moment:
        """What is live now, by category."""
        return _moment(self._live)

    def moments(self) -> Moments:
        """The recorded moments that can be a peak for some length and batch."""
        self._note()
        return prune(self._moments)


def _moment(values: Sequence[float]) -> Moment:
    a, b, c, d, e, f, g, h, i = values
    return Size(a, b, c), Size(d, e, f), Size(g, h, i)


def prune(moments: Iterable[tuple[float, ...]]) -> Moments:
    """Drop the moments that another one exceeds in every coefficient.

    Moments are flat: constant, per token and per score of each category in turn.
    """
    totals = sorted(
        {(m[0] + m[3] + m[6], m[1] + m[4] + m[7], m[2] + m[5] + m[8]): m for m in moments}.items(),
        reverse=True,
    )
    kept: list[tuple[float, float, tuple[float, ...]]] = []
    most_per_token = -1.0
    for (_, per_token, per_score), moment in totals:
        # Constants fall along the list, so only the other two decide.
        if per_token > most_per_token or not any(per_token <= k[0] and per_score <= k[1] for k in kept):
            most_per_token = max(most_per_token, per_token)
            kept.append((per_token, per_score, moment))
    return Moments(_moment(entry[2]) for entry in kept)
