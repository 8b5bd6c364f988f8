"""The trainer's signs of life, given by the thread that trains. Imported by the training process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class HeartbeatCallback(TrainerCallback):  # type: ignore[misc]
    """Beats once a micro-step and once a batch of an evaluation, and before what takes long and cannot beat.

    To be the last of the callbacks: what the others have decided says what comes next. `compiles` says that
    the first step compiles.
    """

    def __init__(self, beat: Callable[[str, int], None], *, compiles: bool) -> None:
        self._beat = beat
        self._stage = "compiling" if compiles else "training"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first step begins."""
        self._beat(self._stage, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step's first micro-step begins."""
        self._beat(self._stage, state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A micro-step without an update is done."""
        self._beat(self._stage, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step is done, and all is compiled."""
        self._stage = "training"
        self._next(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch is done."""
        self._next(state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch of an evaluation is done."""
        self._beat("evaluating", state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation is done; a save may follow."""
        self._beat("saving" if control.should_save else self._stage, state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint is saved."""
        self._beat(self._stage, state.global_step)

    def _next(self, state: TrainerState, control: TrainerControl) -> None:
        stage = "evaluating" if control.should_evaluate else "saving" if control.should_save else self._stage
        self._beat(stage, state.global_step)
