"""Checkpoints of real trainers: as large as the plan says, when they are due, and exact in 16 bits too."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from launcher.models.inspect import inspect_config
from launcher.runs.events import WarningEvent
from launcher.runs.folder import RunFolder
from launcher.runs.kept import checkpoints
from launcher.runs.kept.checkpoints import MANIFEST
from launcher.runs.training_job import TrainingJob
from launcher.training.callbacks import EvaluationStoppedError, LaunchedTrainer
from launcher.training.evaluation import protected_steps
from launcher.training.saving import CheckpointSaver, SavingTimes, save_adapter
from launcher.training.watching.patience import PatientWriter
from planner.planning.needs import checkpoint_bytes
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from tests.stack.test_build import DATA, MODEL, make_job, make_setup, make_trainer, trainable

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


class Evaluated:
    """A trainer of four steps, evaluated and saved after each, with losses that a test chooses; a loss of
    None is an evaluation that a stop breaks off.
    """

    def __init__(self, folder: Path, losses: tuple[float | None, ...]) -> None:
        self.folder = RunFolder(folder)
        self.events: list[Any] = []
        self._losses = losses
        setup = make_setup(method="lora", dtype="float32", gradient_checkpointing=False, lora_r=4)
        self.trainer = make_trainer(
            setup,
            self.folder.checkpoints,
            evaluates=True,
            eval_data_path=str(DATA),
            max_steps=4,
            eval_steps=1,
            save_steps=1,
        )
        self.writer = PatientWriter(
            write=self.events.append, beat=lambda stage, step: None, stop_requested=lambda: False
        )
        protected = lambda: protected_steps(self.trainer.state)  # noqa: E731 (train() makes another state)
        self.trainer.save_with(CheckpointSaver(self.folder, self.writer, 2, protected=protected))
        self.trainer.add_callback(SavingTimes(make_job(setup, save_steps=1)))
        self.trainer.evaluation_loop = self._loop

    def _loop(self, *_: Any, **__: Any) -> EvalLoopOutput:
        loss = self._losses[self.trainer.state.global_step - 1]
        if loss is None:
            raise EvaluationStoppedError("a stop was asked for during the evaluation")
        return EvalLoopOutput(predictions=None, label_ids=None, metrics={"eval_loss": loss}, num_samples=1)

    @property
    def best(self) -> tuple[int | None, float | None]:
        return self.trainer.state.best_global_step, self.trainer.state.best_metric

    def adapter(self) -> Any:
        return save_adapter(self.folder, self.writer, self.trainer, self.trainer.state.global_step)

    def warnings(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, WarningEvent)]


def test_the_best_checkpoint_outlives_the_rotation_and_becomes_the_adapter(tmp_path: Path) -> None:
    run = Evaluated(tmp_path, (2.0, 3.0, 3.5, 4.0))
    run.trainer.train()
    assert checkpoints.steps(run.folder.checkpoints) == [1, 3, 4]
    event = run.adapter()
    assert (event.step, event.evaluation_loss) == (1, 2.0)
    best = run.folder.checkpoints / "checkpoint-1" / "adapter_model.safetensors"
    assert (run.folder.adapter / best.name).read_bytes() == best.read_bytes()
    assert run.warnings() == []


DAMAGE: dict[str, Callable[[Path], object]] = {
    "adapter_model.safetensors is cut": lambda path: os.truncate(path / "adapter_model.safetensors", 100),
    "adapter_model.safetensors is another": lambda path: (path / "adapter_model.safetensors").write_bytes(
        bytes((path / "adapter_model.safetensors").stat().st_size)
    ),
    "adapter_config.json is gone": lambda path: (path / "adapter_config.json").unlink(),
    "manifest.json is gone, with all of it": shutil.rmtree,
}


def test_a_best_checkpoint_that_is_not_whole_is_named_and_the_last_step_is_saved(tmp_path: Path) -> None:
    run = Evaluated(tmp_path, (2.0, 3.0, 3.5, 4.0))
    run.trainer.train()
    best, whole = run.folder.checkpoints / "checkpoint-1", tmp_path / "whole"
    last = run.folder.checkpoints / "checkpoint-4" / "adapter_model.safetensors"
    shutil.copytree(best, whole)
    for damage, break_it in DAMAGE.items():
        shutil.rmtree(best, ignore_errors=True)
        shutil.copytree(whole, best)
        break_it(best)
        run.events.clear()
        event = run.adapter()
        assert (event.step, event.evaluation_loss) == (4, None), damage
        (warning,) = run.warnings()
        assert "the adapter is that of the last step" in warning
        assert str(best / damage.split()[0]) in warning
        assert (run.folder.adapter / last.name).read_bytes() == last.read_bytes(), damage


def test_an_evaluation_that_was_stopped_leaves_the_best_one_and_ends_the_run(tmp_path: Path) -> None:
    run = Evaluated(tmp_path, (3.0, 2.0, None, 1.0))
    run.trainer.train()
    assert run.trainer.state.global_step == 3
    assert run.best == (2, 2.0)
    assert checkpoints.steps(run.folder.checkpoints) == [2, 3]
    assert run.adapter().step == 2
    state = TrainerState.load_from_json(run.folder.checkpoints / "checkpoint-3" / "trainer_state.json")
    assert (state.best_global_step, state.best_metric) == (2, 2.0)


@pytest.mark.parametrize("losses", [(math.nan, None), (math.nan, math.inf, 3.0, 4.0), (None,)])
def test_evaluations_without_a_number_are_never_the_best(
    tmp_path: Path, losses: tuple[float | None, ...]
) -> None:
    run = Evaluated(tmp_path, losses)
    run.trainer.train()
    finite = [step for step, loss in enumerate(losses, 1) if loss is not None and math.isfinite(loss)]
    assert run.best[0] == (finite[0] if finite else None)
    assert run.adapter().step == (finite[0] if finite else len(losses))
    assert run.warnings() == []


def test_an_evaluation_that_cannot_be_done_leaves_the_best_one_and_its_step_saved(tmp_path: Path) -> None:
    run = Evaluated(tmp_path, (3.0, 2.0, 1.0, 1.0))
    loop = run.trainer.evaluation_loop

    def runs_out(*args: Any, **kwargs: Any) -> EvalLoopOutput:
        if run.trainer.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loop(*args, **kwargs)

    run.trainer.evaluation_loop = runs_out
    with pytest.raises(torch.OutOfMemoryError):
        run.trainer.train()
    assert run.best == (2, 2.0)
    assert checkpoints.steps(run.folder.checkpoints) == [2, 3]


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
