"""What a command makes before it starts a run: the model's description, once, and the job."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.commands import train
from launcher.models import inspect
from launcher.runs import supervisor
from launcher.runs.folder import RunFolder
from launcher.runs.record import read_plan
from launcher.runs.training_job import TrainingJob
from launcher.tui import starting
from launcher.tui.cards import DETECTED, Card, card_from_text
from launcher.tui.command_line import flags
from launcher.tui.screens.start_run import StartRun, read_wish
from launcher.tui.sizing import size_up
from planner.base.data_files import PROFILES
from planner.base.errors import InputError
from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup

Cli = Callable[..., Any]
MODEL = PROFILES / "demo" / "model"
DATA = PROFILES / "demo" / "data" / "train.jsonl"
NOT_HERE = "no run is started in this test"


@functools.cache
def demo_model() -> ModelSpec:
    """The demo's model, which is none of the catalog, as a child process describes it."""
    return resolve_model(str(MODEL), inspector=inspect.inspect_in_child)


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All up to the start of a run."""
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"):
        pytest.importorskip(package)

    def refuse(_: Path) -> None:
        raise InputError(NOT_HERE)

    monkeypatch.setattr(supervisor, "start", refuse)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch, no_run: None) -> list[str]:
    """Where the models were that a command had described by a child process."""
    found = []
    model = demo_model()

    def describe(_: Any, *, model_id: str, hub_id: str) -> ModelSpec:
        found.append(hub_id)
        return model

    monkeypatch.setattr(inspect, "inspect_in_child", describe)
    return found


def job_in(runs: Path) -> TrainingJob:
    (folder,) = runs.iterdir()
    return RunFolder(folder).read_job()


def test_train_describes_a_model_outside_the_catalog_once(
    cli: Cli, described: list[str], tmp_path: Path
) -> None:
    done = cli("train", "--model", MODEL, "--data", DATA, "--gpu", "16GB", "--runs", tmp_path)
    assert NOT_HERE in done.err
    assert job_in(tmp_path).model_source == str(MODEL)
    assert described == [str(MODEL)]


def test_the_demo_describes_its_model_once(cli: Cli, described: list[str], tmp_path: Path) -> None:
    done = cli("demo", "--gpu", "16GB", "--runs", tmp_path)
    assert NOT_HERE in done.err
    assert described == [str(MODEL)]


def test_compare_describes_a_model_once_for_all_cards(cli: Cli, described: list[str]) -> None:
    done = cli("compare", "--model", MODEL, "--gpu", "12GB", "--gpu", "16GB", "--compile", "none")
    assert done.code == 0, done.err
    assert described == [str(MODEL)]


@pytest.mark.parametrize(
    "knobs",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "optim": "adamw_torch"},
        {"method": "lora", "packing": True, "gradient_checkpointing": False, "lora_r": 8, "optim": "sgd"},
    ],
    ids=["padded", "packed"],
)
@pytest.mark.parametrize("steps", ["", "7"], ids=["epochs", "steps"])
def test_the_command_line_and_the_interface_start_the_same_job(
    cli: Cli,
    described: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    knobs: dict[str, Any],
    steps: str,
) -> None:
    """The form as it is first shown, and the command that the sizing screen copies."""
    # Without a GPU the command line leaves out what the launcher cannot run on a CPU.
    monkeypatch.setattr(train, "_has_gpu", lambda: True)
    setup = TrainingSetup(model=str(MODEL), max_length=128, attn_implementation="sdpa", **knobs)
    sizing = size_up(setup, demo_model(), card_from_text("16GB"))
    form = StartRun(title="", model_source=str(MODEL), data=str(DATA), runs=str(tmp_path / "tui"))
    with pytest.raises(InputError, match=NOT_HERE):
        starting.start(sizing, read_wish({**form.values, "steps": steps}))
    asked = ["--data", DATA, "--runs", tmp_path / "cli", *(["--max-steps", steps] if steps else [])]
    done = cli("train", *flags(sizing), *asked)
    assert NOT_HERE in done.err, done.err
    job = job_in(tmp_path / "tui")
    assert job == job_in(tmp_path / "cli")
    assert job.setup == setup
    assert job.num_train_epochs == defaults.EPOCHS
    assert job.max_steps == (int(steps) if steps else None)


def test_a_run_on_a_picked_card_of_this_machine_is_planned_for_that_card(
    no_run: None, tmp_path: Path
) -> None:
    target = dataclasses.replace(resolve_gpu("rtx-4090"), index=1, position=1)
    card = Card(target=target, group=DETECTED, argument=None)
    setup = TrainingSetup(model="qwen2.5-0.5b", max_length=512)
    sizing = size_up(setup, resolve_model(setup.model), card)
    form = StartRun(title="", model_source=str(MODEL), data=str(DATA), runs=str(tmp_path))
    with pytest.raises(InputError, match=NOT_HERE):
        starting.start(sizing, read_wish(form.values))
    (folder,) = map(RunFolder, tmp_path.iterdir())
    plan = read_plan(folder)
    assert plan is not None
    assert plan.gpu == target
    assert folder.read_job().gpu_index == 1
