"""Stacks of other trainers: what transformers' own loss holds in a real step of its Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from planner.memory.allocators.native import CachingAllocator
from planner.memory.held.head import HeadShape
from planner.memory.held.logits import logits_memory
from planner.memory.step.logits import LogitsReplay

from .live_bytes import LiveBytes, tensors_of
from .small_models import BASE

TOKENS, HIDDEN, VOCABULARY = 128, 32, 20_000


def shape_of(vocabulary: int) -> HeadShape:
    return HeadShape(
        tokens=TOKENS,
        rows=TOKENS - 1,
        hidden_size=HIDDEN,
        vocab_size=vocabulary,
        hidden_width=2,
        weight_width=2,
        compute_width=2,
        trained=False,
        tile_tokens=TOKENS,
        tile_vocabulary=vocabulary,
        whole=True,
    )


class Logged(LiveBytes):
    """Keeps what is taken and let go of blocks as large as the logits, as bytes a token and entry."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        self.events: list[int] = []
        super().__init__(known)

    def _watch(self, tensor: torch.Tensor, size_bytes: int, operation: str) -> None:
        known = tensor.untyped_storage()._cdata in self._sizes
        super()._watch(tensor, size_bytes, operation)
        if not known and size_bytes >= TOKENS * VOCABULARY:
            self.events.append(round(size_bytes / (TOKENS * VOCABULARY)))

    def _release(self, key: int) -> None:
        size = self._sizes[key][0]
        super()._release(key)
        if size >= TOKENS * VOCABULARY:
            self.events.append(-round(size / (TOKENS * VOCABULARY)))


def step(vocabulary: int, folder: Path) -> tuple[Logged, set[torch.dtype]]:
    """A training step of transformers' Trainer in mixed precision; the dtypes of PEFT's adapter."""
    torch.manual_seed(0)
    shapes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1}
    config = AutoConfig.for_model(**{**BASE, "model_type": "llama", **shapes, "vocab_size": vocabulary})
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    tokens = torch.randint(0, 1000, (1, TOKENS))
    batch = {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones_like(tokens)}
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, bf16=True, report_to=[])
    trainer = Trainer(model=model, args=arguments, train_dataset=[])
    trainer.current_gradient_accumulation_steps = 1
    prepared = trainer.accelerator.prepare(trainer.model)
    prepared.train()
    with Logged([*tensors_of(prepared), *batch.values()]) as live:
        trainer.training_step(prepared, batch)
    return live, dtypes


class Taken:
    """Stands in for the allocator: what is taken and let go of, as Logged has it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.events: list[int] = []

    def allocate(self, size: int) -> int:
        self.sizes.append(size)
        self._note(size, 1)
        return len(self.sizes) - 1

    def free(self, block: int) -> None:
        self._note(self.sizes[block], -1)

    def _note(self, size: int, sign: int) -> None:
        if size >= TOKENS * VOCABULARY:
            self.events.append(sign * round(size / (TOKENS * VOCABULARY)))


def test_transformers_loss_holds_what_is_counted_and_asks_for_it_in_that_order(tmp_path: Path) -> None:
    one, dtypes = step(VOCABULARY, tmp_path)
    two, _ = step(2 * VOCABULARY, tmp_path)
    counted = [logits_memory(shape_of(size)) for size in (VOCABULARY, 2 * VOCABULARY)]
    peaks = [max(memory.forward_bytes, memory.backward_bytes) for memory in counted]
    # 12 bytes a token and entry of the vocabulary.
    assert two.peak_bytes - one.peak_bytes == pytest.approx(peaks[1] - peaks[0], rel=0.02)
    assert one.peak_bytes == pytest.approx(peaks[0], rel=0.02)
    taken = Taken()
    normed = taken.allocate(TOKENS * HIDDEN * 2)
    allocator: CachingAllocator = taken  # type: ignore[assignment]
    LogitsReplay(shape_of(VOCABULARY)).run(allocator, normed, (), workspace_bytes=0, later=False)
    assert taken.events == one.events
    # PEFT's own width of an adapter on a 16-bit base, which Axolotl and LLaMA-Factory leave.
    assert dtypes == {torch.float32}
