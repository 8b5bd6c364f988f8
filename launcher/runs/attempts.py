"""Attempts of a run: the first start, each resumption, each restart by the keeper, with the setup it trains.

`attempts.jsonl` has a line an attempt, written before its trainer starts. job.json stays what was asked; the
last attempt's setup and number of epochs or steps are what the trainer takes. Light: no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.runs.events import (
    AttemptEvent,
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    Event,
    LogEvent,
)
from launcher.runs.training_job import TrainingJob
from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.setup.training_setup import TrainingSetup

REASONS = ("start", "resume", "oom", "hang")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt: `number` from 1, why it is made, the checkpoint's step that it goes on from (0: from the
    beginning), the setup that it trains, and in words what differs from the attempt before ("" if nothing).

    `num_train_epochs` and `max_steps` are the job's unless a resumption changed them.
    """

    number: int
    reason: str
    from_step: int
    setup: TrainingSetup
    num_train_epochs: float
    max_steps: int | None = None
    changes: str = ""

    def __post_init__(self) -> None:
        validate.integer("number", self.number, minimum=1, maximum=10**6)
        validate.choice("reason", self.reason, REASONS)
        validate.integer("from_step", self.from_step, minimum=0, maximum=10**9)
        if not isinstance(self.setup, TrainingSetup):
            raise FieldError("setup", self.setup, "a training setup")
        validate.number("num_train_epochs", self.num_train_epochs, minimum=1e-6, maximum=1e6)
        if self.max_steps is not None:
            validate.integer("max_steps", self.max_steps, minimum=1, maximum=10**9)

    def apply(self, job: TrainingJob) -> TrainingJob:
        """The job as this attempt trains it.

        A run of one process is on the GPU that had most room, several are on the first ones.
        """
        grown = self.setup.num_processes > job.setup.num_processes
        return dataclasses.replace(
            job,
            setup=self.setup,
            num_train_epochs=self.num_train_epochs,
            max_steps=self.max_steps,
            gpu_index=0 if grown else job.gpu_index,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "setup": self.setup.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Attempt:
        """Read the JSON form.

        Raises:
            InputError: not an attempt.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("setup"), Mapping):
            raise InputError("an attempt must be a JSON object with a setup")
        known = {field.name for field in dataclasses.fields(cls)}
        rest = {name: value for name, value in values.items() if name in known}
        try:
            return cls(**{**rest, "setup": TrainingSetup.from_dict(values["setup"])})
        except TypeError as error:
            raise InputError(f"an attempt lacks a value ({error})") from error


def first_attempt(job: TrainingJob) -> Attempt:
    """The attempt that trains a job as it was asked, from its beginning."""
    return Attempt(
        number=1,
        reason="start",
        from_step=0,
        setup=job.setup,
        num_train_epochs=job.num_train_epochs,
        max_steps=job.max_steps,
    )


def as_trained(events: Iterable[Event]) -> list[Event]:
    """The events of the one training that all attempts make together.

    What an attempt goes on from a checkpoint for, it does again: what was told of later steps before is left
    out, and so is every end but the last attempt's.
    """
    kept: list[Event] = []
    for event in events:
        if isinstance(event, AttemptEvent):
            kept = [one for one in kept if not _is_undone(one, event.from_step)]
        kept.append(event)
    return kept


def _is_undone(event: Event, from_step: int) -> bool:
    if isinstance(event, LogEvent | EvalEvent | CheckpointEvent):
        return event.step > from_step
    return isinstance(event, EndEvent)


def read_attempts(path: Path) -> list[Attempt]:
    """All attempts, oldest first; an absent file has none, and a line cut by a kill is left out.

    Raises:
        InputError: a whole line is no attempt.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole = content[: content.rfind("\n") + 1]
    try:
        return [Attempt.from_dict(json.loads(line)) for line in whole.splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path}: not a readable list of attempts ({error})") from error


def add_attempt(path: Path, attempt: Attempt) -> None:
    """Append an attempt and wait until it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, (json.dumps(attempt.to_dict()) + "\n").encode("utf-8"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
