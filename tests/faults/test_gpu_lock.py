"""One run a GPU: who comes second is told who holds it, or waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.commands.waiting import see_that_the_gpu_is_free
from launcher.runs import supervisor
from launcher.runs.folder import RunFolder, create_run_folder
from launcher.runs.locks import live_pid
from launcher.runs.minding import gpu_lock
from launcher.runs.minding.gpu_lock import GpuBusyError, refuse_busy_gpu, take_gpu, wait_for_gpu, who_holds
from launcher.runs.supervisor import status
from launcher.runs.training_job import TrainingJob
from planner.base.errors import ExitCode
from planner.setup.request import make_request
from planner.setup.training_setup import TrainingSetup
from tests.faults import stand_ins

JOB = TrainingJob(setup=TrainingSetup(model="demo", max_length=64), model_source="m", data_path="d.jsonl")
UUID = "GPU-4f1c"


def wait_until(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with one GPU, and stand-ins for the processes."""
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(supervisor, "gpus_of", lambda job: [UUID])
    monkeypatch.setattr(supervisor, "spawn", stand_ins.spawn_stand_in)
    yield
    for name in ("one", "two"):
        for process in ("trainer", "keeper", "sampler"):
            if (pid := live_pid(RunFolder(tmp_path / name), process)) is not None:
                os.kill(pid, signal.SIGKILL)


def make_run(root: Path, name: str, **order: Any) -> RunFolder:
    folder = create_run_folder(root, JOB, name=name)
    stand_ins.order(folder, **order)
    return folder


def test_a_second_run_on_a_gpu_is_told_who_holds_it(tmp_path: Path) -> None:
    one, two = make_run(tmp_path, "one"), make_run(tmp_path, "two", steps=2)
    handle = supervisor.start(one.path)
    wait_until(lambda: live_pid(one, "trainer") is not None)
    with pytest.raises(GpuBusyError) as caught:
        supervisor.start(two.path)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    for words in (str(one.path), f"process {live_pid(one, 'trainer')}", UUID, "since 20"):
        assert words in str(caught.value)
    # It was not begun, and can be started when the GPU is free.
    assert status(two.path).state == "created"

    # The trainer holds the GPU by itself: it is not free while a trainer goes on without its keeper.
    handle.keeper.kill()
    handle.keeper.wait()
    with pytest.raises(GpuBusyError, match="--wait waits"):
        refuse_busy_gpu(UUID)
    told: list[str] = []
    waiting = threading.Thread(target=wait_for_gpu, args=(UUID, told.append))
    waiting.start()
    wait_until(lambda: told)
    assert "waiting for its end" in told[0]
    assert waiting.is_alive()
    supervisor.request_stop(one.path)
    handle.wait(120)
    waiting.join(60)
    assert not waiting.is_alive()
    assert len(told) == 1
    assert supervisor.start(two.path).wait(120).state == "finished"
    wait_until(lambda: who_holds(UUID) is None)


def test_a_lock_that_says_nothing_still_holds_and_a_dead_holder_does_not(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from launcher.runs.minding.gpu_lock import *\n"
        f"take_gpu({UUID!r}, RunFolder(Path('/run\\x1b[2J')))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"held\n"
        with pytest.raises(GpuBusyError, match="trains on GPU"):
            take_gpu(UUID, RunFolder(tmp_path))
        for content in (b"", b"{", b"[]", b'{"run": 3, "since": "x"}', b'{"run": "r", "since": 1e300}'):
            gpu_lock.lock_path(UUID).write_bytes(content)
            assert who_holds(UUID) == f"GPU {UUID} is taken by another run"
        one.kill()
    assert who_holds(UUID) is None
    os.close(take_gpu(UUID, RunFolder(tmp_path)))


def test_a_gpu_of_any_name_has_a_file_of_its_own() -> None:
    assert gpu_lock.lock_path("MIG-GPU-1/0/../x").name == "gpu-MIG-GPU-1-0----x.lock"


def test_the_cpu_has_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.gpus import detect

    def none() -> None:
        raise detect.NoGpuError("none")

    monkeypatch.setattr(detect, "local_gpus", none)
    assert gpu_lock.gpus_of(JOB) == []
    monkeypatch.setattr(detect, "local_gpus", tuple)
    assert gpu_lock.gpus_of(JOB) == []


def test_train_asks_before_it_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan counts what others hold of the GPU: made before the wait it would be for a smaller one."""
    monkeypatch.setattr(gpu_lock, "gpu_at", lambda position: UUID)
    request = make_request("qwen2.5-0.5b", gpu="16GB")
    see_that_the_gpu_is_free(request, wait=False)
    held = take_gpu(UUID, RunFolder(tmp_path))
    with pytest.raises(GpuBusyError, match="--wait waits"):
        see_that_the_gpu_is_free(request, wait=False)
    threading.Timer(0.5, os.close, (held,)).start()
    see_that_the_gpu_is_free(request, wait=True)
    monkeypatch.setattr(gpu_lock, "gpu_at", lambda position: None)
    see_that_the_gpu_is_free(request, wait=False)
