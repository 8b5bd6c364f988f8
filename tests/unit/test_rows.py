"""A plan's rows are what their own commands answer: advice, methods, other cards and smallest cards."""

from __future__ import annotations

import random

import pytest

from benchmarks.limits import judge_rows, random_words

PAIRS = {
    "fits": ("--model", "qwen2.5-3b", "--gpu", "12GB"),
    "fits with fixed execution": (
        *("--model", "llama-3.2-1b", "--gpu", "8GB", "--compile", "none", "--max-length", "2048"),
        *("--gradient-checkpointing", "--per-device-train-batch-size", "2", "--optim", "adamw_8bit"),
    ),
    "does not fit as it is to run": (
        *("--model", "llama-3.1-8b", "--gpu", "8GB", "--max-length", "8192", "--display"),
        *("--lora-r", "64", "--no-gradient-checkpointing", "--per-device-train-batch-size", "4"),
    ),
    "random": random_words(random.Random(20261203)),
}


@pytest.mark.parametrize("words", PAIRS.values(), ids=PAIRS)
def test_every_row_is_what_its_own_command_answers(words: tuple[str, ...]) -> None:
    judged = judge_rows(words)
    assert judged["rows"] >= 3
    assert judged["wrong"] == []
