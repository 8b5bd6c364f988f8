"""The shape of a micro-step: how many tokens go through the layers at once, and how large attention is."""

from __future__ import annotations

from dataclasses import dataclass

from planner.base.units import DTYPE_BYTES, FP32
from planner.models.spec import ModelSpec
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroStep:
    """One forward and backward pass of a setup.

    `tokens` go through the layers, `rows` of them have a label; `scores` are the elements of one head's
    attention matrices, `positions` the length of the rotary tables; `stream_bytes` is the width of the
    embeddings' output.
    """

    tokens: int
    rows: int
    scores: int
    positions: int
    stream_bytes: int


def micro_step(setup: TrainingSetup) -> MicroStep:
    """Shape of a setup's micro-steps, sequences full.

    Packed sequences are flattened into one row (TRL's padding-free batches, sft_trainer.py:916), so that
    attention that is given a mask spans all of their tokens. The first token of a sequence has no label.
    """
    batch, length = setup.per_device_train_batch_size, setup.max_length
    tokens = setup.tokens_per_micro_step
    return MicroStep(
        tokens=tokens,
        rows=tokens - batch,
        scores=tokens**2 if setup.packing else batch * length**2,
        positions=tokens if setup.packing else length,
        stream_bytes=stream_bytes(setup),
    )


def stream_bytes(setup: TrainingSetup) -> int:
    """Width of the embeddings' output: PEFT's k-bit preparation holds what is not quantised in fp32."""
    return FP32 if setup.prepare_for_kbit_training else DTYPE_BYTES[setup.dtype]


def has_biased_linear(model: ModelSpec) -> bool:
    """Whether the decoder layers have a Linear with a bias, which torch computes by cuBLASLt."""
    return any(
        p.module_class == "Linear" and p.kind == "bias" and p.in_decoder_layer for p in model.parameters
    )


def keeps_raw_embedding(setup: TrainingSetup, model: ModelSpec) -> bool:
    """Whether embeddings lie beside their scaled copy: PEFT marks them as a leaf that wants a gradient, and
    the model scales them outside the embedding's own module.
    """
    outside = not any("Scaled" in parameter.module_class for parameter in model.parameters)
    return bool(model.embedding_multiplier) and outside and setup.uses_lora and setup.gradient_checkpointing


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
