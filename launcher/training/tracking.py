"""transformers' tracker callbacks, kept from ending the run. Imported by the training process alone."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from launcher.runs.training_job import TrainingJob
from planner.base.errors import shorten

CALLBACKS: dict[str, Callable[[], TrainerCallback]] = {
    "tensorboard": TensorBoardCallback,
    "wandb": WandbCallback,
    "trackio": TrackioCallback,
}


class Tracked(TrainerCallback):  # type: ignore[misc]
    """Hands a tracker what it listens to. The first error of the tracker is told and ends it, not the run."""

    def __init__(self, name: str, make: Callable[[], TrainerCallback], warn: Callable[[str], None]) -> None:
        self._name = name
        self._make = make
        self._warn = warn
        self._tracker: TrainerCallback | None = None
        self._failed = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The run begins; so does the tracker."""
        with self:
            self._tracker = self._make()
        self._hand("on_train_begin", *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Figures of training or evaluation."""
        self._hand("on_log", *args, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All has been told."""
        self._hand("on_train_end", args, state, control, **kwargs)

    def __enter__(self) -> None:
        """What goes on within is the tracker's."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Take an error, of whatever kind a foreign package has; a request to end the run is none of its."""
        if not isinstance(error, Exception):
            return False
        self._failed = True
        self._warn(
            f"{self._name} has failed and gets no more figures; the run goes on without it "
            f"({type(error).__name__}: {shorten(str(error), 200)})"
        )
        return True

    def _hand(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self._tracker is None or self._failed:
            return
        with self:
            # What it returns would be control of the training.
            getattr(self._tracker, event)(*args, **kwargs)


def tracker_callbacks(job: TrainingJob, warn: Callable[[str], None]) -> list[Tracked]:
    """A callback for each tracker of the job."""
    return [Tracked(name, CALLBACKS[name], warn) for name in job.track]
