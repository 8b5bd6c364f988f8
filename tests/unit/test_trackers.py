"""Trackers: offline, in the run folder, without a key; one that is not installed is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import trackers
from launcher.runs.training_job import TrainingJob
from planner.base.errors import FieldError, MissingExtraError
from planner.setup.training_setup import TrainingSetup

Cli = Callable[..., Any]
SETUP = TrainingSetup(model="m", max_length=64)


def test_offline_trackers_write_into_the_run_folder_and_see_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"WANDB_API_KEY": "canary", "TRACKIO_SPACE_ID": "me/space", "WANDB_PROJECT": "mine"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(trackers, "require", lambda names: None)
    trackers.prepare(tuple(trackers.TRACKERS), tmp_path / "tracking", allow_upload=False)
    assert environment["WANDB_MODE"] == "offline"
    assert "canary" not in environment.values()
    assert "TRACKIO_SPACE_ID" not in environment
    assert environment["WANDB_PROJECT"] == "mine"
    for name in ("WANDB_DIR", "TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR"):
        assert environment[name].startswith(str(tmp_path / "tracking"))
    assert (tmp_path / "tracking").is_dir()


def test_only_where_it_is_allowed_is_anything_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"WANDB_API_KEY": "key"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(trackers, "require", lambda names: None)
    trackers.prepare(("wandb",), tmp_path / "tracking", allow_upload=True)
    assert "WANDB_MODE" not in environment
    assert environment["WANDB_API_KEY"] == "key"


def test_a_run_without_trackers_has_no_folder_for_them(tmp_path: Path) -> None:
    trackers.prepare((), tmp_path / "tracking", allow_upload=False)
    assert not (tmp_path / "tracking").exists()


def test_a_package_that_is_not_there_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"--track wandb needs .* pip install wandb$"):
        trackers.require(("wandb",))


def test_trackers_are_kept_in_the_job() -> None:
    job = TrainingJob(setup=SETUP, model_source="m", data_path="d", track=("wandb", "tensorboard"))
    assert TrainingJob.from_dict(job.to_dict()) == job
    for wrong in (("mlflow",), ("wandb", "wandb"), "wandb"):
        with pytest.raises(FieldError, match="track"):
            TrainingJob(setup=SETUP, model_source="m", data_path="d", track=wrong)  # type: ignore[arg-type]
    old = {key: value for key, value in job.to_dict().items() if key not in ("track", "allow_upload")}
    assert TrainingJob.from_dict(old).track == ()
