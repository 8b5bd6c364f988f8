"""TRL's output head: the tiles that the memory model counts are the ones TRL makes."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer import utils

from planner.memory.held.head import HeadShape, head_memory
from planner.setup.stack import TRL

from .live_bytes import LiveBytes, tensors_of
from .small_models import BASE

LENGTH, HIDDEN = 128, 64


def test_tile_sizes_are_trls() -> None:
    assert TRL.head_tokens == chunked_logprob.TOKEN_CHUNK_SIZE
    assert TRL.head_vocabulary == utils._CHUNKED_LOGPROB_CHUNK_SIZE


def passes(vocabulary: int) -> LiveBytes:
    """Forward and backward of TRL's fused head on one sequence."""
    torch.manual_seed(0)
    shapes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model(**{**BASE, "model_type": "llama", **shapes, "vocab_size": vocabulary})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(requires_grad=False)
    model.model.norm.requires_grad_()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    tokens = torch.randint(0, 1000, (1, LENGTH))
    with LiveBytes([*tensors_of(model), tokens]) as live:
        output = model(input_ids=tokens, labels=tokens, fused_lm_head=True)
        (-output.log_probs.sum()).backward()
    return live


def test_logits_are_never_built() -> None:
    """No tensor as large as the logits, and a larger vocabulary needs no more memory."""
    two, four = (passes(tiles * TRL.head_vocabulary) for tiles in (2, 4))
    logits = LENGTH * 4 * TRL.head_vocabulary * 2
    # On the CPU torch ops stand in for the Triton kernel and hold a tile's numbers in fp32.
    assert four.largest_bytes == (LENGTH - 1) * TRL.head_vocabulary * 4 < logits
    assert four.peak_bytes == two.peak_bytes


def test_head_memory_grows_with_tokens_not_vocabulary() -> None:
    def backward(tokens: int, vocabulary: int) -> int:
        shape = HeadShape(
            tokens=tokens,
            rows=tokens - 1,
            hidden_size=4096,
            vocab_size=vocabulary,
            hidden_width=2,
            weight_width=2,
            compute_width=2,
            trained=False,
            tile_tokens=TRL.head_tokens,
            tile_vocabulary=TRL.head_vocabulary,
        )
        return head_memory(shape).backward_bytes

    assert backward(4096, 32_000) == backward(4096, 256_000)
    # Beyond one tile of tokens only the hidden states' copies and their fp32 gradient grow: 8 bytes each.
    assert backward(2**17, 32_000) - backward(2**16, 32_000) == 2**16 * 4096 * 8
