"""The embedding's gradient, where the embedding is trained."""

from __future__ import annotations

from planner.base.units import FP32

SORTED_EMBEDDING_TOKENS = 3072
"""Tokens up to which torch sums an embedding's gradient in place; beyond, by sorted partial segments."""
EMBEDDING_SEGMENT = 10
"""Tokens of a partial segment (torch native/cuda/EmbeddingBackwardKernel.cu, NROWS_PER_THREAD)."""


def embedding_scratch_bytes(tokens: int, vocab_size: int, hidden_size: int) -> int:
    """fp32 rows in which torch sums a trained embedding's gradient: one a partial segment, at most.

    Source: EmbeddingBackwardKernel.cu, embedding_backward_cuda_kernel; trace llama_f_sel.
    """
    if tokens <= SORTED_EMBEDDING_TOKENS:
        return 0
    return (tokens // EMBEDDING_SEGMENT + min(tokens, vocab_size)) * hidden_size * FP32
