"""Profile: what one measuring run is to do, and its form as a JSON line. Light: no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from planner.errors import InputError
from planner.training_setup import TrainingSetup

PROFILE_FIELDS = ("padded", "steps", "evaluates", "memory_cap_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What to run: a setup, whether batches mix lengths, the steps to measure after warm-up, other phases."""

    setup: TrainingSetup
    padded: bool = False
    steps: int = 3
    evaluates: bool = False
    memory_cap_bytes: int | None = None


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
        found.append(Profile(setup=TrainingSetup.from_dict(values), **own))
    return tuple(found)
