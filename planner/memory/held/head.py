"""Output head and loss, as TRL computes them: log-probabilities in tiles, never the whole logits.

Source: trl/kernels/chunked_logprob.py (ChunkedLogProbFunction) and trainer/utils.py (add_fused_lm_head).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.base.units import DTYPE_BYTES, FP32
from planner.memory.held.micro_step import micro_step
from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup

TOKEN_CHUNK = 4096
"""Tokens a tile covers (chunked_logprob.py, TOKEN_CHUNK_SIZE)."""
VOCABULARY_CHUNK = 32_768
"""Vocabulary entries a tile covers (trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE)."""
ROW_STATISTICS = 8
"""fp32 vectors of one value a token that the forward pass holds beside its tile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMemory:
    """Peaks of the head's passes beyond what the final norm has kept, and what they leave.

    `gradient_bytes` is the head's own weight gradient when it is trained.
    """

    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShape:
    """What the head works on: `tokens` normed hidden states of `hidden_size`, `rows` of which have a label.

    `hidden_bytes`, `weight_bytes` and `compute_bytes` are the widths of the hidden states' elements, of the
    head's weight and of what the products are computed in.
    """

    tokens: int
    rows: int
    hidden_size: int
    vocab_size: int
    hidden_bytes: int
    weight_bytes: int
    compute_bytes: int
    trained: bool

    @property
    def hidden_cast_bytes(self) -> int:
        """A copy of a tile's hidden states in the compute dtype, where they have another."""
        if self.hidden_bytes == self.compute_bytes:
            return 0
        return min(self.rows, TOKEN_CHUNK) * self.hidden_size * self.compute_bytes

    @property
    def piece_bytes(self) -> int:
        """A copy of a tile's piece of the weight in the compute dtype, where it has another."""
        if self.weight_bytes == self.compute_bytes:
            return 0
        return min(self.vocab_size, VOCABULARY_CHUNK) * self.hidden_size * self.compute_bytes

    @property
    def forward_cast_bytes(self) -> int:
        """Both copies in forward, where a piece is let go before the next one (chunked_logprob.py:356)."""
        return self.hidden_cast_bytes + self.piece_bytes

    @property
    def backward_cast_bytes(self) -> int:
        """Both copies in backward: a variable holds a piece until the next one is there (:423)."""
        return self.hidden_cast_bytes + 2 * self.piece_bytes

    @property
    def tile_bytes(self) -> int:
        """One tile of logits."""
        return min(self.rows, TOKEN_CHUNK) * VOCABULARY_CHUNK * self.compute_bytes


def head_shape(setup: TrainingSetup, model: ModelSpec, hidden_bytes: int) -> HeadShape:
    """The head's shape in a setup; `hidden_bytes` is the width of the normed hidden states' elements."""
    shape = micro_step(setup)
    return HeadShape(
        tokens=shape.tokens,
        rows=shape.rows,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        hidden_bytes=hidden_bytes,
        weight_bytes=shape.stream_bytes,
        compute_bytes=DTYPE_BYTES[setup.dtype],
        trained=setup.method == "full",
    )


def head_memory(shape: HeadShape, *, evaluating: bool) -> HeadMemory:
    """Memory of the head for a micro-step, every label counted.

    Forward holds the normed hidden states, a copy of the rows that have a label and one tile. Backward holds
    that copy, an fp32 gradient of it, a tile and at the end the gradient in the hidden states' dtype.
    """
    normed = shape.tokens * shape.hidden_size * shape.hidden_bytes
    selected = shape.rows * shape.hidden_size * shape.hidden_bytes
    weight = shape.hidden_size * shape.vocab_size
    statistics = ROW_STATISTICS * shape.rows * FP32
    forward = normed + selected + shape.tile_bytes + shape.forward_cast_bytes + statistics
    if evaluating:
        return HeadMemory(forward_bytes=forward, backward_bytes=0, gradient_bytes=0)
    gradient = shape.rows * shape.hidden_size * FP32
    narrow = selected if shape.hidden_bytes != FP32 else 0
    backward = selected + gradient + shape.tile_bytes + max(narrow, shape.backward_cast_bytes)
    if shape.trained:
        # The fp32 sum over tiles is the gradient itself where weights are in fp32.
        backward += weight * FP32 + (weight * shape.weight_bytes if shape.weight_bytes != FP32 else 0)
    return HeadMemory(
        forward_bytes=forward,
        backward_bytes=backward,
        gradient_bytes=weight * shape.weight_bytes if shape.trained else 0,
    )
