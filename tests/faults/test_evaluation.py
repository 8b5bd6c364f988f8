"""Evaluation decides in a real run: training ends early, and the adapter is that of the best evaluation."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest

from launcher.runs.ends import RunExit
from launcher.runs.events import (
    AdapterEvent,
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    StageEvent,
    WarningEvent,
    read_events,
)
from launcher.runs.folder import RunFolder, create_run_folder
from launcher.runs.heartbeat import read_beat
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import PROFILES
from planner.setup.training_setup import TrainingSetup
from tests import forks
from tests.faults import broken_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DEMO = PROFILES / "demo"
SETUP = TrainingSetup(
    model="demo", max_length=64, method="lora", dtype="float32", per_device_train_batch_size=2, lora_r=4
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A rate at which the second step ruins what the first one learned, and a tracker that fails."""
    packages = tmp_path_factory.mktemp("packages")
    (packages / "trackio.py").write_text("def init(**options):\n    raise OSError('the tracker is down')\n")
    job = TrainingJob(
        setup=SETUP,
        model_source=str(DEMO / "model"),
        data_path=str(DEMO / "data" / "train.jsonl"),
        learning_rate=0.05,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        max_steps=12,
        eval_steps=1,
        eval_split=4,
        early_stopping_patience=2,
        track=("trackio",),
    )
    folder = create_run_folder(tmp_path_factory.mktemp("runs"), job, name="run")
    trainer = forks.start(
        broken_steps.train,
        folder.path,
        functools.partial(broken_steps.finds_packages_in, str(packages)),
        output=folder.log("trainer"),
        environment={**os.environ, "WANDB_API_KEY": "wandb_canary", "HF_TOKEN": "hf_canary"},
    )
    trainer.join(600)
    assert trainer.exitcode == RunExit.FINISHED, folder.log("trainer").read_text()
    return folder


def of(run: RunFolder, kind: type) -> list[Any]:
    return [event for event in read_events(run.events) if isinstance(event, kind)]


def test_training_ends_when_the_loss_has_not_fallen_for_so_many_evaluations(run: RunFolder) -> None:
    losses = [event.loss for event in of(run, EvalEvent)]
    best = losses.index(min(losses))
    (end,) = of(run, EndEvent)
    assert end.step == len(losses) == best + 1 + 2 < 12
    assert "has not fallen for 2 evaluations" in end.message


def test_the_adapter_is_that_of_the_best_evaluation_and_says_so(run: RunFolder) -> None:
    evaluations = of(run, EvalEvent)
    best = min(evaluations, key=lambda event: event.loss)
    (adapter,) = of(run, AdapterEvent)
    assert (adapter.step, adapter.evaluation_loss) == (best.step, best.loss)
    assert best.step in [event.step for event in of(run, CheckpointEvent)]
    name = "adapter_model.safetensors"
    kept = run.checkpoints / f"checkpoint-{best.step}" / name
    assert (run.adapter / name).read_bytes() == kept.read_bytes()
    assert {"adapter_config.json", "tokenizer.json"} <= {path.name for path in run.adapter.iterdir()}
    assert not (run.adapter / "trainer_state.json").exists()


def test_what_the_run_does_is_told_from_its_first_second_on(run: RunFolder) -> None:
    assert [event.kind for event in read_events(run.events)[:2]] == ["attempt", "stage"]
    told = [(event.stage, event.message) for event in of(run, StageEvent)]
    assert told[:3] == [
        ("loading", "loading the libraries"),
        ("loading", "reading the data"),
        ("loading", "loading the weights"),
    ]
    stages = [stage for stage, _ in told[3:]]
    assert stages[0] == "rehearsing"
    assert {"training", "evaluating"} <= set(stages)
    assert told[-1] == ("saving", "the adapter")
    beat = read_beat(run.heartbeat)
    assert beat is not None
    assert beat.stage == "saving"


def test_a_tracker_that_fails_is_told_and_the_run_goes_on(run: RunFolder) -> None:
    (warning,) = [event.message for event in of(run, WarningEvent) if "trackio" in event.message]
    assert "the tracker is down" in warning
    assert of(run, EndEvent)[0].state == "finished"


def test_no_secret_reaches_a_run_folder_with_trackers(run: RunFolder) -> None:
    for path in run.path.rglob("*"):
        assert not path.is_file() or b"canary" not in path.read_bytes(), path
