"""What a command makes before it starts a run: the model's description, once, and the job."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.commands import train
from launcher.models import inspect
from launcher.runs import supervisor
from launcher.runs.folder import RunFolder
from launcher.runs.minding import gpu_room
from launcher.runs.minding.gpu_lock import take_gpu
from launcher.runs.record import read_plan
from launcher.runs.training_job import TrainingJob
from launcher.tui import starting
from launcher.tui.cards import DETECTED, Card, card_from_text
from launcher.tui.command_line import flags
from launcher.tui.screens.start_run import StartRun, read_wish
from launcher.tui.sizing import size_up
from planner.base.data_files import PROFILES
from planner.base.errors import ExitCode, InputError
from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup
from tests import describing

from .test_gpu_hardware import FakeNvml, use

Cli = Callable[..., Any]
MODEL = PROFILES / "demo" / "model"
DATA = PROFILES / "demo" / "data" / "train.jsonl"
NOT_HERE = "no run is started in this test"


@functools.cache
def demo_model() -> ModelSpec:
    """The demo's model, which is none of the catalog, as a child process describes it."""
    with describing.here():
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


FULL = {"name": "NVIDIA GeForce RTX 4090", "uuid": "GPU-a", "total": 24564, "reserved": 500, "display": 0}


def test_train_on_a_gpu_that_others_hold_says_what_is_missing_or_waits_and_plans_anew(
    cli: Cli, described: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = FULL | {"used": 24000, "processes": [(42, 24000)]}
    use(monkeypatch, FakeNvml(card))
    monkeypatch.setattr(gpu_room, "SETTLING_SECONDS", 0.0)
    command = ("train", "--model", MODEL, "--data", DATA, "--runs", tmp_path, "--optim", "adamw_torch")
    done = cli(*command)
    assert done.code == ExitCode.DOES_NOT_FIT
    (line,) = (line for line in done.err.splitlines() if "GPU" in line)
    assert "are missing on GPU 0: the run needs" in line
    assert "(process 42: 23.44 GiB); --wait waits until it is free" in line
    assert not list(tmp_path.glob("*/job.json"))

    monkeypatch.setattr(gpu_room.time, "sleep", lambda seconds: card.update(used=1000, processes=[]))
    done = cli(*command, "--wait")
    assert NOT_HERE in done.err, done.err
    assert done.err.count("waiting until it is free") == 1
    (folder,) = map(RunFolder, {path.parent for path in tmp_path.glob("*/job.json")})
    plan = read_plan(folder)
    assert plan is not None
    assert plan.gpu.usable_bytes == (24564 - 500 - 1000) * 2**20


BETTER_ON_TWO = (
    *("--optim", "adamw_torch", "--no-packing"),
    *("--per-device-train-batch-size", "1", "--effective-batch-size", "64"),
)
TWO = (FULL | {"used": 0, "processes": []}, FULL | {"uuid": "GPU-b", "used": 0, "processes": []})


def test_a_second_gpu_that_is_busy_is_told_where_the_plan_has_chosen_two(
    cli: Cli, described: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the plan nobody knows how many GPUs it takes: the first one alone is looked at."""
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    use(monkeypatch, FakeNvml(*TWO))
    runs = tmp_path / "runs"
    command = ("train", "--model", MODEL, "--data", DATA, "--runs", runs, *BETTER_ON_TWO)
    held = take_gpu("GPU-b", RunFolder(tmp_path / "other"))
    done = cli(*command)
    os.close(held)
    assert done.code == ExitCode.BAD_INPUT
    (line,) = (line for line in done.err.splitlines() if "GPU-b" in line)
    assert f"the run {tmp_path / 'other'} trains on GPU GPU-b" in line
    assert "--wait waits" in line
    assert not runs.exists()
    done = cli(*command)
    assert NOT_HERE in done.err, done.err
    assert job_in(runs).setup.num_processes == 2


@pytest.mark.parametrize("fixed", [(), ("--num-processes", "2")], ids=["chosen by itself", "asked for"])
def test_a_saved_plan_for_more_gpus_than_there_are_is_refused_in_one_line(
    cli: Cli, described: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fixed: tuple[str, ...]
) -> None:
    use(monkeypatch, FakeNvml(*TWO))
    path = tmp_path / "plan.json"
    asked = cli("plan", "--model", MODEL, "--data", DATA, "-o", path, *BETTER_ON_TWO, *fixed)
    assert asked.code == 0, asked.err
    use(monkeypatch, FakeNvml(TWO[0]))
    done = cli("train", "--plan", path, "--data", DATA, "--runs", tmp_path / "runs")
    assert done.code == ExitCode.BAD_INPUT
    (line,) = done.err.splitlines()
    assert "2 GPUs" in line
    assert "1 " in line
    assert not (tmp_path / "runs").exists()


def test_a_plan_for_a_named_card_looks_at_what_is_free_on_this_one(
    cli: Cli, described: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, FakeNvml(FULL | {"used": 23900, "processes": [(42, None)]}))
    monkeypatch.setattr(gpu_room, "SETTLING_SECONDS", 0.0)
    done = cli("train", "--model", MODEL, "--data", DATA, "--runs", tmp_path, "--gpu", "24GB")
    assert done.code == ExitCode.DOES_NOT_FIT, done.err
    assert "(process 42); --wait" in done.err


def test_the_interface_makes_nothing_while_the_gpu_is_not_free(
    described: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    card = FULL | {"used": 0, "processes": []}
    use(monkeypatch, FakeNvml(card))
    setup = TrainingSetup(model=str(MODEL), max_length=128, optim="adamw_torch")
    sizing = size_up(setup, demo_model(), card_from_text("rtx-4090"))
    form = StartRun(title="", model_source=str(MODEL), data=str(DATA), runs=str(tmp_path / "runs"))
    wish = read_wish(form.values)
    held = take_gpu("GPU-a", RunFolder(tmp_path))
    with pytest.raises(starting.NotFreeError, match="trains on GPU GPU-a") as busy:
        starting.start(sizing, wish)
    os.close(held)
    assert busy.value.need_bytes is None
    card["used"] = 24000
    with pytest.raises(starting.NotFreeError, match="are missing on GPU 0") as full:
        starting.start(sizing, wish)
    assert full.value.need_bytes is not None
    assert not (tmp_path / "runs").exists()
    card["used"] = 0
    with pytest.raises(InputError, match=NOT_HERE):
        starting.start(sizing, wish)


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
