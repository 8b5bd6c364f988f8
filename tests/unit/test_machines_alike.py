"""Several machines plan and resume by themselves: they must train the same from the same step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from launcher.runs.attempts import first_attempt
from launcher.runs.training_job import TrainingJob
from planner.base.errors import InputError
from planner.setup.training_setup import TrainingSetup

pytest.importorskip("torch")

from launcher.training.train import _refuse_unlike

SETUP = TrainingSetup(model="m", max_length=64, num_processes=2, distributed="ddp")
JOB = TrainingJob(setup=SETUP, model_source="m", data_path="d")
MOVED = dataclasses.replace(first_attempt(JOB), from_step=500)


@dataclass
class Beside:
    """Ranks of two machines, of which the other one has said `other`."""

    other: tuple[int, ...] | None = None
    said: tuple[int, ...] = ()

    def exchange(self, *values: int) -> list[tuple[int, ...]]:
        self.said = values
        return [values, values if self.other is None else self.other]


def said_of(job: TrainingJob, attempt: Any) -> tuple[int, ...]:
    ranks = Beside()
    _refuse_unlike(job, attempt, ranks)  # type: ignore[arg-type]
    return ranks.said


@pytest.mark.parametrize(
    ("job", "attempt"),
    [
        (JOB, MOVED),
        (dataclasses.replace(JOB, seed=7), first_attempt(JOB)),
        (dataclasses.replace(JOB, setup=SETUP.replace(max_length=128)), first_attempt(JOB)),
    ],
    ids=["another step", "another seed", "another length"],
)
def test_machines_that_would_train_unalike_are_refused(job: TrainingJob, attempt: Any) -> None:
    other = Beside(other=said_of(job, attempt))
    with pytest.raises(InputError, match="the machines do not train alike"):
        _refuse_unlike(JOB, first_attempt(JOB), other)  # type: ignore[arg-type]


def test_machines_that_train_alike_go_on() -> None:
    assert said_of(JOB, MOVED) == said_of(JOB, MOVED)
