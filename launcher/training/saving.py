"""Checkpoints and the adapter of the training process: when they are saved, and that they are whole.

Imported by the training process alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.runs.events import AdapterEvent, CheckpointEvent, WarningEvent
from launcher.runs.folder import RunFolder
from launcher.runs.kept import checkpoints
from launcher.runs.training_job import TrainingJob
from launcher.training.evaluation import BestCheckpoint, best_checkpoint, weight_files
from launcher.training.several.random_states import random_state, set_random_state
from launcher.training.several.ranks import ALONE, Ranks
from launcher.training.several.whole import is_sharded, trained_weights
from launcher.training.watching.patience import PatientWriter

KEPT_LOGS = 10
"""Entries of the trainer's own log that a checkpoint keeps: all that was logged is in events.jsonl, and a
state that grows with every step would make each checkpoint larger than the one before."""


@dataclass(slots=True)
class CheckpointSaver:
    """Saves checkpoints of a run, one after the other, and rotates them. `verified` are the steps whose
    checkpoints are known to be whole; `protected` tells those that are kept beside the newest.
    """

    folder: RunFolder
    writer: PatientWriter
    keep: int
    verified: set[int] = field(default_factory=set)
    protected: Callable[[], frozenset[int]] = frozenset
    ranks: Ranks = ALONE

    def holds(self, step: int) -> bool:
        """Whether a whole checkpoint of the step is there."""
        return step in self.verified

    def save(self, step: int, write_files: Callable[[Path], None]) -> None:
        """Save the checkpoint of a step; `write_files` writes its files into the folder that it is given.

        One rank does; the others wait for it.

        Raises:
            DiskError: it cannot be written, and somebody asked for an end.
        """
        if self.ranks.saves:
            self._save(step, write_files)
        self.ranks.wait()
        self.verified.add(step)

    def _save(self, step: int, write_files: Callable[[Path], None]) -> None:
        root = self.folder.checkpoints

        def made() -> checkpoints.Checkpoint:
            staged = checkpoints.stage(root, step)
            try:
                write_files(staged)
                return checkpoints.publish(staged, root)
            except BaseException:
                checkpoints.clear_partial(root)
                raise

        self.writer.insist(f"the checkpoint of step {step}", step, root, made)
        self.verified.add(step)
        try:
            checkpoints.rotate(root, keep=self.keep, verified=self.verified, protected=self.protected())
        except OSError as error:
            message = f"older checkpoints could not be removed ({error.strerror})"
            self.writer.write(WarningEvent(time=time.time(), message=message))
        shown = str(checkpoints.path_of(self.folder.shown / root.name, step))
        self.writer.write(CheckpointEvent(time=time.time(), step=step, path=shown))


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    ranks: Ranks = ALONE,
    gathered: Mapping[str, Any] | None = None,
) -> None:
    """Write what was trained (safetensors) and the tokenizer: no pickle of the arguments beside them.

    One rank writes; all must ask at the same place unless the weights have been gathered.
    """
    state: Mapping[str, Any] | None = None
    if is_sharded(model):
        state = trained_weights(model, keep=ranks.saves) if gathered is None else gathered
    if not ranks.saves:
        return
    # PEFT's "auto" would ask the Hub whether the vocabulary was resized; it never is here.
    options: dict[str, Any] = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    if state is not None:
        options["state_dict"] = state
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)


def save_adapter(folder: RunFolder, writer: PatientWriter, trainer: Any, step: int) -> AdapterEvent | None:
    """Write adapter/ so that it appears whole or not at all, in place of that of an attempt before.

    One rank writes and tells it; all must ask at the same place.

    It is that of the best evaluation where a later step was worse, as its checkpoint holds it.

    Raises:
        DiskError: it cannot be written, and somebody asked for an end.
    """
    trainer.gather()
    gathered = trainer.gathered_weights()
    if not trainer.ranks.saves:
        return None
    partial, best = folder.partial_adapter, _best(folder, writer, trainer.state)

    def made() -> None:
        folder.clear_partial()
        try:
            if best is not None and best.step < step:
                partial.mkdir()
                for path in weight_files(best.path):
                    shutil.copyfile(path, partial / path.name)
                trainer.processing_class.save_pretrained(partial)
            else:
                save_model(trainer.model, trainer.processing_class, partial, gathered=gathered)
            checkpoints.place(partial, folder.adapter)
        except BaseException:
            folder.clear_partial()
            raise

    writer.insist("the adapter", step, folder.path, made)
    return AdapterEvent(
        time=time.time(),
        step=step if best is None else best.step,
        path=str(folder.shown / folder.adapter.name),
        evaluation_loss=None if best is None else best.loss,
    )


def _best(folder: RunFolder, writer: PatientWriter, state: TrainerState) -> BestCheckpoint | None:
    """The best evaluation's checkpoint; told where it is not whole, and the last step's adapter is saved."""
    best = best_checkpoint(state, folder.checkpoints)
    if best is None or best.step == state.global_step:
        return best
    try:
        checkpoints.verify(best.path)
    except checkpoints.BrokenCheckpointError as error:
        message = f"the adapter is that of the last step, since the best evaluation's is not whole: {error}"
        writer.write(WarningEvent(time=time.time(), message=message))
        return None
    return best


class SavingTimes(TrainerCallback):  # type: ignore[misc]
    """Says when a checkpoint is due: every `save_steps` steps, `save_minutes` after the last one, at the end
    of an epoch where time decides, and whenever the training ends.

    At an epoch's last step the save waits for what comes at its end: an evaluation there draws a random
    number, and a run that goes on from before it would have drawn one less.
    """

    def __init__(
        self, job: TrainingJob, clock: Callable[[], float] = time.monotonic, ranks: Ranks = ALONE
    ) -> None:
        self._ranks = ranks
        self._steps = job.save_steps
        self._minutes = job.saves_every_minutes
        self._clock = clock
        self._saved_at = 0.0
        self._due = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Time begins."""
        self._saved_at = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save, unless it is an epoch's last step."""
        by_steps = self._steps is not None and state.global_step % self._steps == 0
        by_time = False
        if self._minutes is not None:
            # Ranks' clocks differ, and all have to save in the same step.
            by_time = self._ranks.any(self._clock() - self._saved_at >= 60 * self._minutes)
        self._due = by_steps or by_time or control.should_training_stop
        control.should_save = self._due and not _ends_an_epoch(state)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save what the epoch's last step has put off, and once an epoch where time decides."""
        control.should_save = _ends_an_epoch(state) and (self._due or self._minutes is not None)
        return control

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """The next one is due so much later."""
        self._saved_at = self._clock()
        self._due = False


def _ends_an_epoch(state: TrainerState) -> bool:
    return float(state.epoch or 0.0).is_integer()


class RandomStates(TrainerCallback):  # type: ignore[misc]
    """The random states from before the step that runs, to which a save amid it goes back.

    They are those that a checkpoint of the step before would hold: mid-epoch as they are when the step
    begins, at an epoch's start as they are before its order is drawn.
    """

    def __init__(self) -> None:
        self._states: tuple[Any, ...] | None = None

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Remember them."""
        self.take()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember them, but for an epoch's first step."""
        if not _ends_an_epoch(state):
            self.take()

    def restore(self) -> None:
        """Go back to them."""
        if self._states is not None:
            set_random_state(self._states)

    def take(self) -> None:
        """Remember them as they are."""
        self._states = random_state()
