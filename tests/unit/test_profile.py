"""Profiles of measuring runs: their JSON lines, data of real lengths, and the allocator to measure with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from launcher.measuring.profile import Profile, profile_line, read_profiles
from launcher.measuring.profiler import NotCleanError, Profiler
from launcher.runs.allocator import measuring_environment
from planner.base.errors import FieldError, InputError
from planner.setup.cuda_allocator import ALLOCATORS, EXPANDABLE, NATIVE, VARIABLES, machine_allocator
from planner.setup.training_setup import TrainingSetup


def make_setup(**changes: object) -> TrainingSetup:
    return TrainingSetup.from_dict(
        {"model": "qwen2.5-0.5b", "max_length": 512, "per_device_train_batch_size": 4, **changes}
    )


def test_a_profile_with_lengths_reads_back(tmp_path: Path) -> None:
    profiles = (
        Profile(setup=make_setup(train_sampling_strategy="group_by_length"), lengths=(7, 500, 90), steps=9),
        Profile(setup=make_setup(), padded=True),
    )
    path = tmp_path / "profiles.jsonl"
    path.write_text("".join(profile_line(one) + "\n" for one in profiles))
    assert read_profiles(path) == profiles


@pytest.mark.parametrize("allocator", [None, *ALLOCATORS])
def test_a_profile_with_an_allocator_reads_back(allocator: str | None, tmp_path: Path) -> None:
    profile = Profile(setup=make_setup(), allocator=allocator)
    line = profile_line(profile)
    assert json.loads(line)["allocator"] == allocator
    path = tmp_path / "profiles.jsonl"
    path.write_text(line + "\n")
    assert read_profiles(path) == (profile,)


def test_a_profile_that_names_no_allocator_asks_for_the_machines(tmp_path: Path) -> None:
    values = json.loads(profile_line(Profile(setup=make_setup())))
    del values["allocator"]
    path = tmp_path / "profiles.jsonl"
    path.write_text(json.dumps(values))
    (profile,) = read_profiles(path)
    assert profile.allocator is None


@pytest.mark.parametrize("allocator", ["", "expandable_segments:True", "cudaMallocAsync"])
def test_an_allocator_of_another_name_is_refused(allocator: str, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="allocator"):
        Profile(setup=make_setup(), allocator=allocator)
    path = tmp_path / "profiles.jsonl"
    path.write_text(profile_line(Profile(setup=make_setup(), allocator=NATIVE)).replace(NATIVE, allocator))
    with pytest.raises(InputError, match=f"allocator.*{EXPANDABLE}"):
        read_profiles(path)


class MeasuringError(Exception):
    """Raised where a measurement would begin."""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("allocator", [None, *ALLOCATORS])
@pytest.mark.parametrize("process", ALLOCATORS)
def test_a_process_measures_only_with_its_own_allocator(
    allocator: str | None, process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(profiler: Profiler) -> int:
        raise MeasuringError

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in measuring_environment({}, allocator=process).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Profiler, "__init__", lambda profiler: None)
    monkeypatch.setattr(Profiler, "_patched", False, raising=False)
    monkeypatch.setattr(Profiler, "reset", lambda profiler: None)
    monkeypatch.setattr(Profiler, "_host_block", begin)
    fits = process == (allocator or machine_allocator())
    with pytest.raises(MeasuringError if fits else NotCleanError):
        Profiler().measure(Profile(setup=make_setup(), allocator=allocator))


def test_batches_are_padded_where_examples_of_several_lengths_share_one() -> None:
    assert Profile(setup=make_setup(), lengths=(7, 500)).mixes_lengths
    assert not Profile(setup=make_setup(), lengths=(600, 700)).mixes_lengths
    assert not Profile(setup=make_setup(packing=True), lengths=(7, 500)).mixes_lengths
    assert not Profile(setup=make_setup(per_device_train_batch_size=1), lengths=(7, 500)).mixes_lengths


@pytest.mark.parametrize("changes", [{"lengths": (0, 4)}, {"lengths": (4,), "padded": True}])
def test_lengths_that_mean_nothing_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Profile(setup=make_setup(), **changes)  # type: ignore[arg-type]


def test_packing_and_grouping_contradict_each_other() -> None:
    with pytest.raises(InputError, match="train_sampling_strategy group_by_length needs packing false"):
        make_setup(packing=True, train_sampling_strategy="group_by_length")
