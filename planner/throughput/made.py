"""Tensors made: what a decoder layer's passes launch and write, counted on the memory model's own tape."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from planner.memory.decoder.layer import run_layer
from planner.memory.layers.layer_knobs import LayerKnobs
from planner.memory.tape.tape import Buffer, Tape, Value
from planner.models.spec import LayerSpec


class Made(NamedTuple):
    """Tensors made: how many, and their bytes as on the tape."""

    launches: int
    constant: float
    per_token: float
    per_score: float

    def plus(self, other: Made, count: int) -> Made:
        """These and so many times the others."""
        return Made(
            self.launches + count * other.launches,
            self.constant + count * other.constant,
            self.per_token + count * other.per_token,
            self.per_score + count * other.per_score,
        )

    def bytes_at(self, tokens: int, scores: int) -> float:
        """Bytes in a micro-step of that many tokens and score elements."""
        return self.constant + tokens * self.per_token + scores * self.per_score


NOTHING = Made(0, 0.0, 0.0, 0.0)


class LayerWork(NamedTuple):
    """Tensors that one layer makes in a micro-step: forward, recomputed in the backward pass, backward; and
    those that it keeps from forward to backward.
    """

    forward: Made
    recomputed: Made
    backward: Made
    kept: Made


class _CountingTape(Tape):
    """A tape that counts what is made and forgets what lives."""

    def __init__(self, *, saves: bool) -> None:
        super().__init__(saves=saves)
        self.launches = self.saved = 0
        self.constant = self.per_token = self.per_score = 0.0
        self.saved_per_token = self.saved_per_score = 0.0

    def made(self) -> Made:
        """What was made so far."""
        return Made(self.launches, self.constant, self.per_token, self.per_score)

    def kept(self) -> Made:
        """What backward nodes hold of it, parameters and their copies left out, each once."""
        return Made(self.saved, 0.0, self.saved_per_token, self.saved_per_score)

    def tokens(self, per_token: float, category: int = 0) -> Buffer:
        self.launches += 1
        self.per_token += per_token
        return Buffer(0.0, per_token, 0.0, 0)

    def _take(self, constant: float, per_token: float, per_score: float, slot: int) -> Buffer:
        self.launches += 1
        self.constant += constant
        self.per_token += per_token
        self.per_score += per_score
        return Buffer(constant, per_token, per_score, 0)

    def free(self, *buffers: Buffer | None) -> None:
        for buffer in buffers:
            if buffer is not None:
                buffer.holders -= 1

    def save(self, buffer: Buffer) -> Buffer | None:
        if not self.saves:
            return None
        if not buffer.saves:
            self.saved += 1
            self.saved_per_token += buffer.per_token
            self.saved_per_score += buffer.per_score
        buffer.saves += 1
        buffer.holders += 1
        return buffer


@lru_cache(maxsize=8192)
def layer_work(
    layer: LayerSpec, knobs: LayerKnobs, *, checkpointed: bool, input_requires_grad: bool
) -> LayerWork:
    """Work of one decoder layer in one micro-step; a checkpointed one runs forward twice."""
    first = NOTHING
    if checkpointed:
        first = forward_alone(layer, knobs)
    tape = _CountingTape(saves=True)
    hidden = Value(tape.tokens(0), input_requires_grad or checkpointed)
    output = run_layer(tape, layer, knobs, hidden)
    forward, kept = tape.made(), tape.kept()
    output.grad = tape.tokens(layer.hidden_size * output.width)
    tape.backward()
    backward = tape.made().plus(forward, -1)
    if checkpointed:
        return LayerWork(first, forward, backward, kept)
    return LayerWork(forward, NOTHING, backward, kept)


@lru_cache(maxsize=8192)
def forward_alone(layer: LayerSpec, knobs: LayerKnobs) -> Made:
    """Tensors of a forward pass that keeps nothing."""
    tape = _CountingTape(saves=False)
    run_layer(tape, layer, knobs, Value(tape.tokens(0), False))
    return tape.made()
