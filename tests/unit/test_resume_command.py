"""`vramwise runs resume` and the options of checkpoints, as far as they go without training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.commands.saving import saving_wish
from launcher.runs import stack
from launcher.runs.folder import create_run_folder
from launcher.runs.job import JobWish, create_planned_run
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import PROFILES
from planner.base.errors import ExitCode, InputError
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from planner.setup.training_setup import TrainingSetup

Cli = Callable[..., Any]
DEMO = PROFILES / "demo"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    job = TrainingJob(
        setup=TrainingSetup(model="m", max_length=64),
        model_source=str(DEMO / "model"),
        data_path=str(DEMO / "data" / "train.jsonl"),
    )
    create_run_folder(tmp_path / "runs", job, name="one")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("resume",), "needs the name of a run"),
        (("resume", "two"), "unknown run 'two'"),
        (("resume", "one"), "has not been started"),
        (("resume", "one", "--epochs", "-1"), "epochs"),
        (("resume", "one", "--accept-changes", "all"), "accept_changes"),
        (("list", "--max-steps", "3"), "--max-steps is for runs resume"),
    ],
)
def test_a_resumption_that_cannot_be_is_refused_in_one_line(
    cli: Cli, runs: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr(stack, "require", lambda what: None)
    done = cli("runs", *arguments, "--runs", runs)
    assert done.code == 2
    assert said in done.err
    assert done.err.strip().count("\n") == 0


def options(**given: Any) -> Any:
    usual = {"save_steps": None, "save_minutes": None, "keep_checkpoints": None, "no_checkpoints": False}
    return SimpleNamespace(**{**usual, **given})


@pytest.mark.parametrize(
    ("given", "wish"),
    [
        ({}, {"save_steps": None, "save_minutes": None, "keep_checkpoints": 2}),
        ({"save_steps": 5}, {"save_steps": 5, "save_minutes": None, "keep_checkpoints": 2}),
        ({"save_minutes": 0.5, "keep_checkpoints": 3}, {"save_minutes": 0.5, "keep_checkpoints": 3}),
        ({"no_checkpoints": True}, {"checkpoints": False}),
        ({"save_steps": 0}, {"checkpoints": False}),
        ({"save_minutes": 0.0}, {"checkpoints": False}),
    ],
)
def test_checkpoints_are_on_unless_they_are_switched_off(given: dict[str, Any], wish: dict[str, Any]) -> None:
    assert saving_wish(options(**given)).items() >= wish.items()


@pytest.mark.parametrize(
    "given", [{"no_checkpoints": True, "save_steps": 5}, {"save_steps": 0, "keep_checkpoints": 2}]
)
def test_checkpoints_both_on_and_off_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no checkpoints are wanted"):
        saving_wish(options(**given))


def test_one_kept_checkpoint_is_refused() -> None:
    with pytest.raises(InputError, match="keep_checkpoints"):
        TrainingJob(
            setup=TrainingSetup(model="m", max_length=64),
            model_source="m",
            data_path="d",
            keep_checkpoints=1,
        )


def test_a_disk_without_room_for_the_checkpoints_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(make_request("qwen2.5-0.5b", gpu="16GB", knobs={"max_length": 512}))
    needed = plan.loading.result_bytes + 5 * plan.loading.checkpoint_bytes
    assert plan.loading.written_bytes(4) == needed
    wish = JobWish(model_source="m", data=tmp_path / "d.jsonl", keep_checkpoints=4)
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**15, 0, free))
    with pytest.raises(InputError, match="the adapter and 5 checkpoints need") as caught:
        create_planned_run(tmp_path / "runs", plan, wish)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert not (tmp_path / "runs").exists()
    free = needed
    create_planned_run(tmp_path / "runs", plan, wish)
