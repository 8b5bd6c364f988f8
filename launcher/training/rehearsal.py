"""The worst batch first: before its first step a run goes through the longest micro-batch of its data.

A run that does not fit then ends within its first minute, not in the night at its longest examples. Nothing
of it is kept: gradients, optimizer state, adapter, random numbers and counts are those of before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from launcher.training.several.random_states import random_state, set_random_state
from launcher.training.several.whole import local

if TYPE_CHECKING:
    from datasets import Dataset

    from launcher.training.callbacks import LaunchedTrainer


class Rehearsal(TrainerCallback):  # type: ignore[misc]
    """Runs the longest micro-batch forward, backward and through the optimizer, and the longest evaluation.

    `tell` is given a sentence with what it took, beside `planned_bytes`, the reserve of a step by the plan,
    where there is one. Without examples of several lengths the first step is the
    worst one already, and nothing is run. A full fine-tuning keeps no copy of its weights, so that its
    optimizer step is left out. Must come after the callbacks that change how layers are run.
    """

    def __init__(
        self, trainer: LaunchedTrainer, tell: Callable[[str], None], *, planned_bytes: int | None = None
    ) -> None:
        self._trainer = trainer
        self._tell = tell
        self._planned_bytes = planned_bytes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rehearse.

        Raises:
            torch.OutOfMemoryError: the longest micro-batch does not fit.
        """
        trainer = self._trainer
        rows = longest_rows(trainer.train_dataset, args.per_device_train_batch_size)
        if args.packing or rows is None:
            return
        length = max(len(row["input_ids"]) for row in rows)
        model = trainer.model_wrapped
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        with nothing_kept(trainer):
            # With accumulation the second one finds the first one's gradients there.
            for _ in range(min(2, args.gradient_accumulation_steps)):
                # TRL's own: the launcher's keeps each loss for its look at divergence.
                SFTTrainer.training_step(trainer, model, trainer.data_collator(rows), targets(rows))
            if not trainer.optimizer.state and _trains_adapters(trainer):
                trainer.optimizer.optimizer.step()
            peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
            self._evaluate()
        took = "went through" if peak is None else f"took {peak / 2**30:.2f} GiB of the GPU"
        if peak is not None and self._planned_bytes is not None:
            took += f" (planned {self._planned_bytes / 2**30:.2f})"
        self._tell(f"the longest micro-batch, {len(rows)} x {length:,} tokens, {took}")

    def _evaluate(self) -> None:
        """The longest evaluation batch; on a GPU alone, where memory is short.

        On the CPU bitsandbytes rewrites 4-bit weights in place for inference, and training would go on with
        those.
        """
        trainer = self._trainer
        if trainer.eval_dataset is None or not torch.cuda.is_available():
            return
        count = trainer.args.per_device_eval_batch_size
        rows = longest_rows(trainer.eval_dataset, count) or list(trainer.eval_dataset.select(range(1)))
        try:
            self._predict(rows)
            return
        except torch.OutOfMemoryError:
            if trainer.args.world_size > 1:
                raise
            trainer.evaluate_one_by_one()
        self._predict(rows[:1])

    def _predict(self, rows: list[dict[str, Any]]) -> None:
        trainer = self._trainer
        trainer.model.eval()
        try:
            trainer.prediction_step(trainer.model_wrapped, trainer.data_collator(rows), True)
        finally:
            trainer.model.train()


def longest_rows(dataset: Dataset, count: int) -> list[dict[str, Any]] | None:
    """The `count` longest rows; None where all rows are of one length."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    if len(set(lengths)) < 2:
        return None
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [dataset[index] for index in order[:count]]


def targets(rows: list[dict[str, Any]]) -> torch.Tensor:
    """Labels that count, the first of each row apart: nothing predicts it."""
    return torch.tensor(sum(label != -100 for row in rows for label in row["labels"][1:]))


def _trains_adapters(trainer: LaunchedTrainer) -> bool:
    return hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")


@contextmanager
def nothing_kept(trainer: LaunchedTrainer) -> Iterator[None]:
    """Put back what a step changes; after an error too, so that what is saved then is sound."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    before = [local(p.detach()).to("cpu", copy=True) for p in trained] if _trains_adapters(trainer) else []
    fresh = not trainer.optimizer.state
    counts = trainer.counts()
    numbers = random_state()
    try:
        yield
    finally:
        trainer.model.zero_grad(set_to_none=True)
        if fresh:
            trainer.optimizer.optimizer.state.clear()
        for parameter, value in zip(trained, before, strict=False):
            local(parameter.data).copy_(value)
        trainer.set_counts(counts)
        set_random_state(numbers)
        if torch.cuda.is_available():
            # The steps then reserve what they would have, and their peaks are their own.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
