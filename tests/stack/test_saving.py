"""Checkpoints of real trainers: as large as the plan says, when they are due, and exact in 16 bits too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from launcher.models.inspect import inspect_config
from launcher.runs.folder import RunFolder
from launcher.runs.kept import checkpoints
from launcher.runs.kept.checkpoints import MANIFEST
from launcher.runs.training_job import TrainingJob
from launcher.training.callbacks import LaunchedTrainer
from launcher.training.patience import PatientWriter
from launcher.training.saving import CheckpointSaver, SavingTimes
from planner.planning.needs import checkpoint_bytes
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from tests.stack.test_build import MODEL, make_job, make_setup, make_trainer, trainable

pytestmark = pytest.mark.slow

SETUPS: dict[str, dict[str, Any]] = {
    "qlora, 8 bits": {"lora_r": 64, "optim": "adamw_8bit"},
    "lora, fused": {"method": "lora", "dtype": "float32", "lora_r": 64, "optim": "adamw_torch_fused"},
    "dora, lion": {"method": "lora", "lora_r": 64, "use_dora": True, "optim": "paged_lion_8bit"},
    "adafactor": {"method": "lora", "lora_r": 64, "optim": "adafactor"},
    "all weights": {"method": "full", "dtype": "bfloat16", "optim": "paged_adamw_8bit"},
}


def saving_trainer(setup: TrainingSetup, folder: Path) -> LaunchedTrainer:
    trainer = make_trainer(setup, folder, max_steps=1)
    writer = PatientWriter(
        write=lambda event: None, beat=lambda stage, step: None, stop_requested=lambda: False
    )
    trainer.save_with(CheckpointSaver(RunFolder(folder), writer, 2))
    trainer.add_callback(SavingTimes(make_job(setup, save_steps=1)))
    return trainer


@pytest.mark.parametrize("kind", SETUPS)
def test_a_checkpoint_is_as_large_as_the_plan_says(tmp_path: Path, kind: str) -> None:
    """Never larger, and by no more than a tenth smaller but for what is small and the same for all models."""
    setup = make_setup(gradient_checkpointing=False, **SETUPS[kind])
    saving_trainer(setup, tmp_path).train()
    saved = checkpoints.newest(tmp_path / "checkpoints").newest
    assert saved is not None
    model = inspect_config(Path(MODEL), model_id="demo", hub_id="demo")
    said = checkpoint_bytes(TrainingRun(setup=setup, model=model))
    assert saved.size_bytes <= said <= 1.1 * saved.size_bytes + 100_000
    names = {path.name for path in saved.path.iterdir()}
    assert {MANIFEST, "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} < names
    assert not [name for name in names if name.endswith(".bin")]


def test_adapters_in_16_bits_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    trainer = saving_trainer(make_setup(gradient_checkpointing=False), tmp_path)
    trainer.train()
    before = {name: p.detach().clone() for name, p in trainable(trainer).items()}
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    for parameter in trainable(trainer).values():
        parameter.data.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoints" / "checkpoint-1"))
    for name, parameter in trainable(trainer).items():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name]), name


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def steps_saved(job: TrainingJob, *, epochs: int, seconds_a_step: float, stop_at: int = 0) -> list[int]:
    """Steps at which a checkpoint is saved, of an epoch of five steps."""
    clock, saved = Clock(), []
    times, state, control = SavingTimes(job, clock), TrainerState(), TrainerControl()
    times.on_train_begin(None, state, control)

    def save() -> None:
        if control.should_save:
            saved.append(state.global_step)
            times.on_save(None, state, control)
        control.should_save = False

    for step in range(1, 5 * epochs + 1):
        clock.now += seconds_a_step
        state.global_step, state.epoch = step, step / 5
        control.should_training_stop = step in (stop_at, 5 * epochs)
        times.on_step_end(None, state, control)
        save()
        if step % 5 == 0 or control.should_training_stop:
            times.on_epoch_end(None, state, control)
            save()
        if control.should_training_stop:
            break
    return saved


SETUP = TrainingSetup(model="m", max_length=64)


@pytest.mark.parametrize(
    ("asked", "seconds", "stop_at", "expected"),
    [
        ({}, 1, 0, [5, 10, 15]),
        ({}, 250, 0, [3, 5, 8, 10, 13, 15]),
        ({"save_minutes": 5.0}, 250, 0, [2, 4, 5, 7, 9, 10, 12, 14, 15]),
        ({"save_steps": 4}, 1000, 0, [4, 8, 12, 15]),
        ({"save_steps": 5}, 1, 0, [5, 10, 15]),
        ({"save_steps": 7, "save_minutes": 10.0}, 250, 0, [3, 5, 7, 10, 13, 14, 15]),
        ({}, 1, 7, [5, 7]),
        ({"save_steps": 100}, 1, 5, [5]),
    ],
)
def test_checkpoints_are_saved_when_they_are_due(
    asked: dict[str, Any], seconds: float, stop_at: int, expected: list[int]
) -> None:
    job = TrainingJob(setup=SETUP, model_source="m", data_path="d", **asked)
    assert steps_saved(job, epochs=3, seconds_a_step=seconds, stop_at=stop_at) == expected
