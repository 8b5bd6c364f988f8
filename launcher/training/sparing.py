"""Evaluation that runs out of memory: done again one example at a time, never at the cost of the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTTrainer

from launcher.training.ending import is_out_of_memory


@dataclass(frozen=True, slots=True)
class TrainerCounts:
    """What TRL counts over micro-steps between two logs (SFTTrainer._metrics, _total_train_tokens)."""

    metrics: tuple[tuple[str, tuple[tuple[str, tuple[float, ...]], ...]], ...]
    tokens: float


class SparingTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose evaluation falls back to one example at a time, and tells so by `tell`."""

    tell: Callable[[str], None] = staticmethod(lambda message: None)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; where memory runs out, once more with one example at a time.

        Raises:
            torch.OutOfMemoryError: one example is too much; a checkpoint of this step is saved before.
        """
        if self.args.per_device_eval_batch_size > 1:
            try:
                return dict(super().evaluate(*args, **kwargs))
            except (RuntimeError, MemoryError) as error:
                # One rank alone cannot begin anew: the others are amid the evaluation.
                if not is_out_of_memory(error) or self.args.world_size > 1:
                    raise
            # Not within the handler: its traceback holds the batch that was too much.
            self.evaluate_one_by_one()
        try:
            return dict(super().evaluate(*args, **kwargs))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and self.args.world_size == 1:
                self._save_checkpoint(self.model_wrapped, trial=None)
            raise

    def evaluate_one_by_one(self) -> None:
        """From now on evaluate batches of one example."""
        self.args.per_device_eval_batch_size = 1
        self.model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._metrics["eval"].clear()
        self.tell("evaluation ran out of memory; from here on it takes one example at a time")

    def counts(self) -> TrainerCounts:
        """What has been counted since the last log."""
        metrics = tuple(
            (mode, tuple((name, tuple(values)) for name, values in found.items()))
            for mode, found in self._metrics.items()
        )
        return TrainerCounts(metrics, self._total_train_tokens)

    def set_counts(self, counts: TrainerCounts) -> None:
        """Put back what counts() gave."""
        self._metrics = {
            mode: defaultdict(list, {name: list(values) for name, values in found})
            for mode, found in counts.metrics
        }
        self._total_train_tokens = counts.tokens
