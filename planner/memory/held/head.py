"""Output head and loss, as TRL computes them: log-probabilities in tiles, never the whole logits.

Source: trl/kernels/chunked_logprob.py (ChunkedLogProbFunction) and trainer/utils.py (add_fused_lm_head).
"""

from __future__ import annotations

from planner.base.units import FP32
from planner.base.values import dataclass
from planner.setup.run import TrainingRun

ROW_STATISTICS = 8
"""fp32 vectors of one value a token that the forward pass holds beside its tile."""
KEPT_ROW_BYTES = 16
"""Bytes a token that forward leaves beside its hidden state: label, log of the sum, entropy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMemory:
    """Peaks of the head's passes beyond what the final norm has kept, and what they leave.

    `gradient_bytes` is the head's own weight gradient when it is trained, `kept_bytes` what forward leaves
    for backward.
    """

    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int
    kept_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShape:
    """What the head works on: `tokens` normed hidden states of `hidden_size`, `rows` of which have a label.

    `hidden_width`, `weight_width` and `compute_width` are the widths of the hidden states' elements, of the
    head's weight and of what the products are computed in; a tile covers at most `tile_tokens` tokens and
    `tile_vocabulary` entries of the vocabulary, which are all where the stack makes the logits `whole`.
    A head that `scores` gives one number a token instead.
    A `copied` weight is a copy of the base's with rows that are trained in it, made for each pass, whose
    gradient goes as soon as those rows have theirs (peft tuners/trainable_tokens/layer.py).
    """

    tokens: int
    rows: int
    hidden_size: int
    vocab_size: int
    hidden_width: int
    weight_width: int
    compute_width: int
    trained: bool
    tile_tokens: int
    tile_vocabulary: int
    whole: bool = False
    scores: bool = False
    copied: bool = False

    @property
    def copy_bytes(self) -> int:
        """Such a copy."""
        return self.hidden_size * self.vocab_size * self.weight_width if self.copied else 0

    @property
    def narrows(self) -> bool:
        """Whether products are computed in fewer bits than fp32, so that a loss in fp32 takes copies."""
        return self.compute_width != FP32

    @property
    def hidden_cast_bytes(self) -> int:
        """A copy of a tile's hidden states in the compute dtype, where they have another."""
        if self.hidden_width == self.compute_width:
            return 0
        return min(self.rows, self.tile_tokens) * self.hidden_size * self.compute_width

    @property
    def piece_bytes(self) -> int:
        """A copy of a tile's piece of the weight in the compute dtype, where it has another."""
        if self.weight_width == self.compute_width:
            return 0
        return min(self.vocab_size, self.tile_vocabulary) * self.hidden_size * self.compute_width

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
        return min(self.rows, self.tile_tokens) * self.tile_vocabulary * self.compute_width


def head_shape(run: TrainingRun, hidden_width: int) -> HeadShape:
    """The head's shape in a run; `hidden_width` is the width of the normed hidden states' elements."""
    shape, stack = run.micro_step, run.stack
    whole = stack.head_tokens is None or stack.head_vocabulary is None
    copied = run.trained.token_rows > 0 and run.model.tied_embeddings
    return HeadShape(
        tokens=shape.tokens,
        rows=shape.rows,
        hidden_size=run.model.hidden_size,
        vocab_size=run.model.vocab_size,
        hidden_width=hidden_width,
        weight_width=shape.stream_width,
        compute_width=run.storage.width,
        trained=run.trained.head or copied,
        tile_tokens=stack.head_tokens or shape.tokens,
        tile_vocabulary=stack.head_vocabulary or run.model.vocab_size,
        whole=whole,
        scores=run.setup.objective.scores,
        copied=copied,
    )


def head_memory(shape: HeadShape) -> HeadMemory:
    """Memory of the head for a micro-step, every label counted.

    Forward holds the normed hidden states, a copy of the rows that have a label and one tile. Backward holds
    that copy, an fp32 gradient of it, a tile and at the end the gradient in the hidden states' dtype.
    """
    normed = shape.tokens * shape.hidden_size * shape.hidden_width
    selected = shape.rows * shape.hidden_size * shape.hidden_width
    weight = shape.hidden_size * shape.vocab_size
    statistics = ROW_STATISTICS * shape.rows * FP32
    forward = normed + selected + shape.tile_bytes + shape.forward_cast_bytes + statistics + shape.copy_bytes
    gradient = shape.rows * shape.hidden_size * FP32
    narrow = selected if shape.hidden_width != FP32 else 0
    backward = selected + gradient + shape.tile_bytes + max(narrow, shape.backward_cast_bytes)
    backward += shape.copy_bytes
    if shape.trained:
        # The fp32 sum over tiles is the gradient itself where weights are in fp32.
        backward += weight * FP32 + (weight * shape.weight_width if shape.weight_width != FP32 else 0)
    return HeadMemory(
        forward_bytes=forward,
        backward_bytes=backward,
        gradient_bytes=weight * shape.weight_width if shape.trained and not shape.copied else 0,
        kept_bytes=selected + KEPT_ROW_BYTES * shape.rows,
    )
