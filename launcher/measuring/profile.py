"""Profile: what one measuring run is to do, and its form as a JSON line. Light: no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from planner.base import validate
from planner.base.errors import InputError
from planner.setup.cuda_allocator import ALLOCATORS
from planner.setup.training_setup import MAX_LENGTH, TrainingSetup

PROFILE_FIELDS = ("padded", "steps", "evaluates", "memory_cap_bytes", "lengths", "allocator")


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What to run: a setup, whether batches mix lengths, the steps to measure after warm-up, other phases.

    `lengths` are tokens of real data's examples; with them a run trains on such examples, batched, grouped or
    packed as the setup says, over as many epochs as its steps take, and its useful tokens are counted.
    `allocator` is the one to measure with, null for the one that suits the machine.

    Raises:
        InputError: a length is below 1, or lengths together with `padded`, which they decide.
    """

    setup: TrainingSetup
    padded: bool = False
    steps: int = 3
    evaluates: bool = False
    memory_cap_bytes: int | None = None
    lengths: tuple[int, ...] = ()
    allocator: str | None = None

    def __post_init__(self) -> None:
        if self.lengths and self.padded:
            raise InputError("a profile has either lengths or padded")
        if self.allocator is not None:
            validate.choice("allocator", self.allocator, ALLOCATORS)
        for length in self.lengths:
            validate.integer("lengths", length, minimum=1, maximum=MAX_LENGTH)

    @property
    def mixes_lengths(self) -> bool:
        """Whether examples of several lengths share a batch, so that the batch is padded."""
        setup = self.setup
        mixed = len({min(length, setup.max_length) for length in self.lengths}) > 1
        return self.padded or (mixed and not setup.packing and setup.per_device_train_batch_size > 1)


def profile_line(profile: Profile) -> str:
    """A profile as a JSON line: its setup's keys, and its own beside them."""
    own = {field: getattr(profile, field) for field in PROFILE_FIELDS}
    return json.dumps({**profile.setup.to_dict(), **own})


def read_profiles(path: Path) -> tuple[Profile, ...]:
    """Profiles of a JSON-lines file.

    Raises:
        InputError: a line is not a profile.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number}: {error}") from error
        own = {field: values.pop(field) for field in PROFILE_FIELDS if field in values}
        own["lengths"] = tuple(own.get("lengths", ()))
        found.append(Profile(setup=TrainingSetup.from_dict(values), **own))
    return tuple(found)
