from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import supervisor
from launcher.allocator import allocator_environment, is_expandable, measuring_environment
from launcher.profile import Profile
from planner.training_setup import TrainingSetup

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE = {VARIABLE: "expandable_segments:True"}


def test_batches_of_many_lengths_get_expandable_segments() -> None:
    assert allocator_environment({}, lengths_vary=True) == EXPANDABLE
    assert allocator_environment({}, lengths_vary=False) == {}


def test_what_a_person_has_set_stays_in_a_run_and_goes_for_a_measurement() -> None:
    own = {VARIABLE: "max_split_size_mb:64", "HOME": "/h"}
    assert allocator_environment(own, lengths_vary=True) == {}
    assert measuring_environment(own, lengths_vary=False) == {"HOME": "/h"}
    assert measuring_environment(own, lengths_vary=True) == {"HOME": "/h", **EXPANDABLE}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("expandable_segments:True", True),
        ("a:1, expandable_segments:True", True),
        ("a:1", False),
        ("", False),
    ],
)
def test_the_setting_is_read_as_torch_reads_it(value: str, expected: bool) -> None:
    assert is_expandable({VARIABLE: value}) is expected


def test_packed_rows_and_equal_lengths_do_not_vary() -> None:
    setup = TrainingSetup(model="m", max_length=64)
    assert Profile(setup=setup, lengths=(8, 9)).lengths_vary
    assert not Profile(setup=setup, lengths=(8, 8)).lengths_vary
    assert not Profile(setup=setup).lengths_vary
    assert not Profile(setup=setup.replace(packing=True), lengths=(8, 9)).lengths_vary


def test_a_process_is_started_with_the_variables_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.run_folder import RunFolder

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "says.py").write_text(f"import os; print(os.environ.get({VARIABLE!r}))", encoding="utf-8")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    child = supervisor._spawn(folder, "trainer", "says", EXPANDABLE)
    assert child.wait(30) == 0
    assert folder.log("trainer").read_text(encoding="utf-8").strip() == EXPANDABLE[VARIABLE]
    assert VARIABLE not in os.environ
