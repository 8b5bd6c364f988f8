"""What evaluation decides: which checkpoint is the best one, that it is kept, and when training ends early.

Imported by the training process alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from launcher.runs.kept.checkpoints import path_of
from launcher.runs.training_job import TrainingJob
from launcher.training.arguments import METRIC


@dataclass(frozen=True, kw_only=True, slots=True)
class BestCheckpoint:
    """The checkpoint of the lowest evaluation loss so far."""

    step: int
    loss: float
    path: Path


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Has a checkpoint written at each evaluation whose loss is the lowest so far."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        """Ask for it. The trainer saves after this; in between it sets best_metric, but the step of it only
        where it decides itself when to save (Trainer._determine_best_metric).
        """
        loss = (metrics or {}).get(METRIC)
        if loss is not None and loss < (math.inf if state.best_metric is None else state.best_metric):
            state.best_global_step = state.global_step
            control.should_save = True
        return control


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]
    """transformers' own, without its warning that nobody loads the best model (saving.save_adapter takes it),
    and counting on where a resumed run left off.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the counter of the checkpoint that the run goes on from."""
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        name = "early_stopping_patience_counter"
        setattr(self, name, int(kept.get("attributes", {}).get(name, 0)))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        """Stop when the patience is at its end."""
        super().on_evaluate(args, state, control, metrics=metrics or {}, **kwargs)
        return control


def evaluation_callbacks(job: TrainingJob) -> list[TrainerCallback]:
    """What a run that evaluates needs beside its events; without checkpoints the best one cannot be kept."""
    patience = job.early_stopping_patience
    keeping = [KeepBest()] if job.checkpoints else []
    return [*keeping, *([] if patience is None else [EarlyStopping(patience)])]


def early_end(state: TrainerState, job: TrainingJob) -> str:
    """Why a run that nobody stopped ended before its last step; "" where it did not."""
    if state.global_step >= state.max_steps or job.early_stopping_patience is None:
        return ""
    return (
        f"ended after step {state.global_step} of {state.max_steps}: the evaluation loss has not fallen for "
        f"{job.early_stopping_patience} evaluations"
    )


def protected_steps(state: TrainerState) -> frozenset[int]:
    """Steps whose checkpoints no rotation may remove: the best one's, which becomes the adapter."""
    return frozenset([state.best_global_step]) if state.best_global_step else frozenset()


def best_checkpoint(state: TrainerState, checkpoints: Path) -> BestCheckpoint | None:
    """The best checkpoint, where it is under `checkpoints` if it is there; None without evaluation."""
    step, loss = state.best_global_step, state.best_metric
    if not step or loss is None:
        return None
    return BestCheckpoint(step=int(step), loss=float(loss), path=path_of(checkpoints, int(step)))


def weight_files(checkpoint: Path) -> list[Path]:
    """What save_pretrained wrote of model or adapter into a checkpoint; the rest is for going on training."""
    names = ("adapter_model*.safetensors*", "adapter_config.json", "model*.safetensors*", "*config.json")
    found = {path for name in names for path in checkpoint.glob(name)}
    return sorted(path for path in found if path.name != "tokenizer_config.json")
