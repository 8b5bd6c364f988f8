"""Output head and loss, as TRL computes them: log-probabilities in tiles, never the whole logits.

Source: trl/kernels/chunked_logprob.py (ChunkedLogProbFunction) and trainer/utils.py (add_fused_lm_head).
"""

from __future__ import annotations

from dataclasses import dataclass

TOKEN_CHUNK = 4096
"""Tokens a tile covers (chunked_logprob.py, TOKEN_CHUNK_SIZE)."""
VOCABULARY_CHUNK = 32_768
"""Vocabulary entries a tile covers (trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE)."""
FP32 = 4
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


def head_memory(
    *,
    tokens: int,
    sequences: int,
    hidden_size: int,
    vocab_size: int,
    width: int,
    trained: bool,
    evaluating: bool,
) -> HeadMemory:
    """Memory of the head for a micro-step of so many tokens, every label counted.

    Forward holds the normed hidden states, a copy of the rows that have a label and one tile. Backward holds
    that copy, an fp32 gradient of it, a tile and at the end the gradient in the stream's dtype.
    """
    rows = tokens - sequences
    tile = min(rows, TOKEN_CHUNK) * VOCABULARY_CHUNK * width
    normed = tokens * hidden_size * width
    selected = rows * hidden_size * width
    weight = hidden_size * vocab_size
    forward = normed + selected + tile + ROW_STATISTICS * rows * FP32
    if evaluating:
        return HeadMemory(forward_bytes=forward, backward_bytes=0, gradient_bytes=0)
    gradient = rows * hidden_size * FP32
    backward = selected + gradient + tile + selected
    if trained:
        backward += weight * FP32 + weight * width
    return HeadMemory(
        forward_bytes=forward,
        backward_bytes=backward,
        gradient_bytes=weight * width if trained else 0,
    )
