"""How torch's CUDA allocator is chosen and set: by machine, by what a person has set, and for measuring."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import allocator, keeper
from launcher.runs.allocator import (
    allocator_environment,
    fall_back,
    measuring_environment,
    process_allocator,
)
from launcher.runs.folder import RunFolder, create_run_folder
from launcher.runs.minding.compiled_cache import VARIABLE as CACHE
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import user_cache_dir
from planner.setup.cuda_allocator import (
    ALLOCATORS,
    EXPANDABLE,
    NATIVE,
    VARIABLES,
    asked_allocator,
    machine_allocator,
    planned_allocator,
)
from planner.setup.training_setup import TrainingSetup

CUDA, GENERAL = VARIABLES
SETTING = {CUDA: "expandable_segments:True"}
LINUX_RELEASE, WSL_RELEASE = "6.8.0-45-generic", "5.15.153.1-microsoft-standard-WSL2"
MACHINES = [
    ("linux", LINUX_RELEASE, EXPANDABLE),
    ("linux", WSL_RELEASE, NATIVE),
    ("linux", "4.4.0-19041-Microsoft", NATIVE),
    ("win32", "", NATIVE),
    ("cygwin", LINUX_RELEASE, NATIVE),
    ("darwin", "24.1.0", EXPANDABLE),
]
ASKED: list[tuple[dict[str, str], str | None]] = [
    ({}, None),
    ({"HOME": "/h"}, None),
    ({CUDA: "expandable_segments:True"}, EXPANDABLE),
    ({GENERAL: "expandable_segments:True"}, EXPANDABLE),
    ({CUDA: "max_split_size_mb:64, expandable_segments : True"}, EXPANDABLE),
    ({CUDA: "max_split_size_mb:64"}, NATIVE),
    ({CUDA: ""}, NATIVE),
    ({CUDA: "expandable_segments:False"}, NATIVE),
    # The last setting counts, and the name for CUDA before the one for all accelerators.
    ({CUDA: "expandable_segments:True,expandable_segments:False"}, NATIVE),
    ({CUDA: "expandable_segments:False,expandable_segments:True"}, EXPANDABLE),
    ({CUDA: "expandable_segments:True", GENERAL: "max_split_size_mb:64"}, EXPANDABLE),
    ({CUDA: "max_split_size_mb:64", GENERAL: "expandable_segments:True"}, NATIVE),
    ({CUDA: "", GENERAL: "expandable_segments:True"}, NATIVE),
]


def kernel(release: str) -> os.uname_result:
    return os.uname_result(("Linux", "host", release, "", "x86_64"))


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Linux machine on which nobody has set anything; tests set what differs."""
    monkeypatch.setattr(os, "uname", lambda: kernel(LINUX_RELEASE))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(("system", "release", "expected"), MACHINES)
def test_expandable_segments_suit_every_machine_but_windows_and_its_subsystem(
    system: str, release: str, expected: str
) -> None:
    assert machine_allocator(system, release) == expected


@pytest.mark.parametrize(("environment", "expected"), ASKED)
def test_settings_are_read_as_torch_reads_them(environment: dict[str, str], expected: str | None) -> None:
    assert asked_allocator(environment, "linux") == expected
    assert asked_allocator(environment, "win32") == (None if expected is None else NATIVE)


@pytest.mark.parametrize(("environment", "expected"), ASKED)
def test_a_process_that_is_told_nothing_has_torchs_default(
    environment: dict[str, str], expected: str | None, on_machine: pytest.MonkeyPatch
) -> None:
    assert process_allocator(environment) == (expected or NATIVE)


@pytest.mark.parametrize(("environment", "expected"), ASKED)
def test_a_plan_is_for_what_a_person_has_set_else_for_the_machines(
    environment: dict[str, str], expected: str | None, on_machine: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        on_machine.setenv(name, value)
    assert planned_allocator() == (expected or EXPANDABLE)
    on_machine.setattr(os, "uname", lambda: kernel(WSL_RELEASE))
    assert planned_allocator() == (expected or NATIVE)


def test_a_run_gets_expandable_segments_unless_a_person_has_set_something(
    on_machine: pytest.MonkeyPatch,
) -> None:
    assert allocator_environment({"HOME": "/h"}) == SETTING
    for name in VARIABLES:
        for value in ("max_split_size_mb:64", "expandable_segments:False", ""):
            assert allocator_environment({name: value}) == {}


@pytest.mark.parametrize(("system", "release"), [machine[:2] for machine in MACHINES if machine[2] == NATIVE])
def test_a_run_gets_nothing_where_expandable_segments_do_not_work(
    system: str, release: str, on_machine: pytest.MonkeyPatch
) -> None:
    on_machine.setattr(allocator, "machine_allocator", lambda: machine_allocator(system, release))
    assert allocator_environment({}) == {}
    assert measuring_environment({"HOME": "/h"}) == {"HOME": "/h"}


def test_what_a_person_has_set_goes_for_a_measurement(on_machine: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        own = {name: "max_split_size_mb:64,expandable_segments:False", "HOME": "/h"}
        assert measuring_environment(own) == {"HOME": "/h", **SETTING}
        assert measuring_environment(own, allocator=EXPANDABLE) == {"HOME": "/h", **SETTING}
        assert measuring_environment({**own, **SETTING}, allocator=NATIVE) == {"HOME": "/h"}
        for asked in ALLOCATORS:
            assert process_allocator(measuring_environment(own, allocator=asked)) == asked


@pytest.mark.parametrize("own", [None, "max_split_size_mb:64"])
def test_the_trainer_is_started_with_expandable_segments_a_kept_cache_and_what_a_person_has_set(
    own: str | None, tmp_path: Path, on_machine: pytest.MonkeyPatch
) -> None:
    names = (*VARIABLES, CACHE)
    said = f"import os; print([os.environ.get(name) for name in {names!r}])"
    (tmp_path / "says.py").write_text(said, encoding="utf-8")
    on_machine.setenv("PYTHONPATH", str(tmp_path))
    on_machine.delenv(CACHE, raising=False)
    if own is not None:
        on_machine.setenv(GENERAL, own)
        on_machine.setenv(CACHE, "/kept")
    asked = keeper.spawn

    def spawn_another(
        folder: RunFolder, process: str, module: str, variables: dict[str, str] | None = None, **_: Any
    ) -> subprocess.Popen[bytes]:
        return asked(folder, process, "says", variables)

    on_machine.setattr(keeper, "spawn", spawn_another)
    on_machine.setattr(keeper.signal, "signal", lambda *_: None)
    on_machine.setattr(keeper.Keeper, "_end_sampler", lambda self: self._sampler.wait(500))
    job = TrainingJob(
        setup=TrainingSetup(model="m", max_length=64, packing=True), model_source="m", data_path="d.jsonl"
    )
    folder = create_run_folder(tmp_path, job, name="run")
    assert keeper.main([str(folder.path)]) == 0
    trainer = folder.log("trainer").read_text(encoding="utf-8").strip()
    kept = str(user_cache_dir() / "compiled") if own is None else "/kept"
    assert trainer == str([SETTING[CUDA] if own is None else None, own, kept])
    untouched = str([None, own, None if own is None else "/kept"])
    assert folder.log("sampler").read_text(encoding="utf-8").strip() == untouched
    assert CUDA not in os.environ


TORCH_READS = """
import json, os, torch
for environment in {environments!r}:
    child = os.fork()
    if not child:
        os.environ.update(environment)
        print(json.dumps(torch._C._accelerator_getAllocatorSettings()), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_torch_reads_the_variable_that_we_read(on_machine: pytest.MonkeyPatch) -> None:
    """What each of the environments sets, as the installed torch says."""
    environments = [environment for environment, expected in ASKED if expected is not None]
    child = subprocess.run(
        [sys.executable, "-c", TORCH_READS.format(environments=environments)],
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    read = [json.loads(line) for line in child.stdout.splitlines()]
    assert read == [next(env[name] for name in VARIABLES if name in env) for env in environments]


class FakeDriver:
    """libcuda; `supported` is what it says of virtual memory, `broken` the call that fails."""

    def __init__(self, supported: int, broken: str = "") -> None:
        self.supported, self.broken = supported, broken

    def cuInit(self, flags: int) -> int:
        return int(self.broken == "cuInit")

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return int(self.broken == "cuDeviceGet")

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        assert attribute == 102
        value._obj.value = self.supported
        return int(self.broken == "cuDeviceGetAttribute")


@pytest.mark.parametrize(
    ("driver", "kept"),
    [
        (FakeDriver(1), True),
        (FakeDriver(0), False),
        (FakeDriver(0, "cuInit"), True),
        (FakeDriver(0, "cuDeviceGet"), True),
        (FakeDriver(0, "cuDeviceGetAttribute"), True),
        (None, True),
    ],
)
def test_a_driver_that_cannot_map_memory_has_torchs_default(
    driver: FakeDriver | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> FakeDriver:
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr("launcher.runs.allocator.ctypes.CDLL", load)
    environment = {"HOME": "/h", **SETTING}
    said = fall_back(environment)
    assert (said is None) is kept
    assert environment == ({"HOME": "/h", **SETTING} if kept else {"HOME": "/h"})
    assert fall_back({"HOME": "/h"}) is None
