"""The arguments of TRL's trainer: asked for by the names that the installed libraries have."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest

from launcher.runs.training_job import TrainingJob
from launcher.training.arguments import checkpointing, sft_config
from planner.setup.training_setup import TrainingSetup


@dataclasses.dataclass
class Before524:
    gradient_checkpointing: bool = True
    gradient_checkpointing_kwargs: dict[str, bool] | None = None


@dataclasses.dataclass
class From524(Before524):
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, bool] | None = None


@dataclasses.dataclass
class Later:
    activation_checkpointing: bool = False
    activation_checkpointing_kwargs: dict[str, bool] | None = None


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Before524, "gradient_checkpointing"),
        (From524, "activation_checkpointing"),
        (Later, "activation_checkpointing"),
    ],
)
def test_checkpointing_goes_by_the_name_that_is_known(config: type, name: str, asked: bool) -> None:
    setup = TrainingSetup(model="m", max_length=64, gradient_checkpointing=asked)
    given = checkpointing(setup, config)
    assert given == {name: asked, f"{name}_kwargs": {"use_reentrant": False} if asked else None}
    config(**given)


@pytest.mark.parametrize("asked", [True, False])
def test_the_installed_libraries_take_the_arguments_without_a_warning(asked: bool, tmp_path: Path) -> None:
    setup = TrainingSetup(model="m", max_length=64, gradient_checkpointing=asked)
    job = TrainingJob(setup=setup, model_source="m", data_path="d")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        found = sft_config(setup, job, output_dir=tmp_path, on_gpu=False, evaluates=False)
    assert found.gradient_checkpointing is asked
    assert found.gradient_checkpointing_kwargs == ({"use_reentrant": False} if asked else None)
