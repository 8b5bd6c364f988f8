"""A GPU whose memory other processes hold: what is missing is said, and waited for."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.commands import resume
from launcher.runs import stack, supervisor
from launcher.runs.attempts import first_attempt
from launcher.runs.folder import RunFolder
from launcher.runs.job import JobWish, create_planned_run
from launcher.runs.kept import fingerprint, resumption
from launcher.runs.minding import gpu_room
from launcher.runs.minding.gpu_lock import take_gpu
from planner.answers.plan import Plan
from planner.base.errors import ExitCode, InputError
from planner.gpus.spec import MIB
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request

from .test_gpu_hardware import FakeNvml, h100, use

pytest.importorskip("psutil")
Cli = Callable[..., Any]
GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """A machine with one GPU; each time that somebody sleeps the next of `then` comes to hold it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **held: Any) -> None:
        self.card = h100(**held)
        self.then: list[dict[str, Any]] = []
        self.slept = 0
        self.told: list[str] = []
        use(monkeypatch, FakeNvml(self.card))
        monkeypatch.setattr(gpu_room.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.slept += 1
        if self.then:
            self.card.update(self.then.pop(0))


def test_what_is_missing_and_who_holds_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [(7, None), (42, 30720), (43, 20480), (44, 1024), (45, 512)]
    Machine(monkeypatch, used=53000, processes=processes)
    lacking = gpu_room.shortage(0, 40 * GIB)
    assert str(lacking) == (
        "12.58 GiB are missing on GPU 0: the run needs 40.00 GiB, 27.42 GiB are free, and others hold the "
        "rest (process 42: 30.00 GiB, process 43: 20.00 GiB, process 44: 1.00 GiB and 2 more)"
    )
    # Of other containers the driver lists nobody.
    Machine(monkeypatch, used=53000)
    assert str(gpu_room.shortage(0, 40 * GIB)).endswith("and others hold the rest")


@pytest.mark.parametrize(
    ("used", "need_bytes", "is_short"),
    [
        (1079, 80000 * MIB, False),
        (1080, 80000 * MIB, True),
        (70000, 81079 * MIB, True),
        (70000, 81079 * MIB + 1, False),
    ],
    ids=["room to the byte", "a mebibyte too little", "all of the card", "more than the card has"],
)
def test_only_what_others_hold_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, used: int, need_bytes: int, is_short: bool
) -> None:
    Machine(monkeypatch, used=used)
    assert (gpu_room.shortage(0, need_bytes) is not None) == is_short
    assert gpu_room.shortage(1, need_bytes) is None


def test_it_is_waited_until_there_is_room_and_said_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, used=79000, processes=[(42, 79000)])
    machine.then = [
        {"used": 78000},
        {"used": 70000, "processes": [(43, 70000)]},
        {"used": 41079, "processes": []},
    ]
    gpu_room.wait_for_room(0, 40000 * MIB, machine.told.append)
    assert machine.slept == 3
    assert [message.split(": ")[0].split(" are")[0] for message in machine.told] == ["37.03 GiB", "28.24 GiB"]
    assert all(message.endswith("; waiting until it is free") for message in machine.told)
    assert "process 42" in machine.told[0]
    assert "process 43" in machine.told[1]


def test_what_a_process_held_that_has_just_ended_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, used=79000)
    machine.then = [{}, {"used": 0}]
    gpu_room.refuse_full_gpu(0, 40 * GIB)
    assert machine.slept == 2


def test_a_run_comes_before_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    machine = Machine(monkeypatch, used=79000)
    held = take_gpu(machine.card["uuid"], RunFolder(tmp_path))
    assert f"the run {tmp_path} trains on GPU" in str(gpu_room.in_the_way(0, 40 * GIB))
    os.close(held)
    assert "are missing on GPU 0" in str(gpu_room.in_the_way(0, 40 * GIB))
    assert gpu_room.in_the_way(0, None) is None
    machine.card["used"] = 0
    assert gpu_room.in_the_way(0, 40 * GIB) is None


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(make_request("qwen2.5-0.5b", gpu="h100-80gb", knobs={"max_length": 512}))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: Plan) -> RunFolder:
    """A run of that plan that could go on, of which a resumption is prepared whenever it is asked for."""
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    folder = create_planned_run(
        tmp_path / "runs", plan, JobWish(model_source="m", data=tmp_path / "d.jsonl"), name="one"
    )
    monkeypatch.setattr(stack, "require", lambda what: None)
    return folder


def prepared(folder: RunFolder, *_: Any) -> resumption.Resumption:
    return resumption.Resumption(
        attempt=dataclasses.replace(first_attempt(folder.read_job()), number=2, reason="resume"),
        checkpoint=None,
        broken=(),
        fingerprint=fingerprint.Fingerprint(data=(), model=(), versions=(), job=""),
    )


def test_a_resumption_without_room_is_refused_in_one_line_or_waits(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, run: RunFolder, plan: Plan
) -> None:
    asked: list[RunFolder] = []

    def prepare(folder: RunFolder, wish: object) -> resumption.Resumption:
        asked.append(folder)
        return prepared(folder)

    def begins(*_: Any) -> None:
        raise InputError("it begins")

    monkeypatch.setattr(resumption, "prepare", prepare)
    monkeypatch.setattr(supervisor, "resume", begins)
    monkeypatch.setattr(gpu_room, "SETTLING_SECONDS", 0.0)
    machine = Machine(monkeypatch, used=80000, processes=[(42, 80000)])
    done = cli("runs", "resume", "one", "--runs", run.path.parent)
    assert done.code == ExitCode.DOES_NOT_FIT
    assert done.err.count("\n") == 1
    assert "are missing on GPU 0" in done.err
    assert "--wait waits" in done.err
    machine.then = [{"used": 0}]
    done = cli("runs", "resume", "one", "--runs", run.path.parent, "--wait")
    assert "it begins" in done.err
    assert "waiting until it is free" in done.err
    # Looked at again after the wait, in which all may have changed.
    assert len(asked) == 3
    assert cli("runs", "show", "one", "--runs", run.path.parent, "--wait").err.endswith(
        "--wait is for runs resume\n"
    )


def test_an_attempt_that_was_made_smaller_needs_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, run: RunFolder, plan: Plan
) -> None:
    attempt = first_attempt(run.read_job())
    smaller = dataclasses.replace(
        attempt, setup=attempt.setup.replace(per_device_train_batch_size=1, gradient_accumulation_steps=16)
    )
    assert plan.setup.per_device_train_batch_size > 1
    Machine(monkeypatch, used=81079 - plan.memory.peak_upper_bytes // MIB + 1)
    monkeypatch.setattr(gpu_room, "SETTLING_SECONDS", 0.0)
    with pytest.raises(gpu_room.GpuFullError) as caught:
        resume.see_that_a_run_can_go_on(run, attempt, wait=False)
    assert caught.value.need_bytes == plan.memory.peak_upper_bytes
    assert not resume.see_that_a_run_can_go_on(run, smaller, wait=False)


def test_a_resumption_on_fewer_gpus_that_can_never_fit_is_refused_before_any_wait(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A 70B on four GPUs of 80 GB goes on with two, and not with one, whatever else is on it."""
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    knobs = {"max_length": 512, "method": "lora", "distributed": "fsdp"}
    sharded = make_plan(make_request("llama-3.1-70b", gpu="4xh100-80gb", knobs=knobs))
    assert sharded.setup.num_processes == 4
    wish = JobWish(model_source="m", data=tmp_path / "d.jsonl")
    run = create_planned_run(tmp_path / "runs", sharded, wish, name="large")

    def prepare(folder: RunFolder, wish: resumption.ResumeWish) -> resumption.Resumption:
        plan = prepared(folder)
        setup = resumption.shared_by(plan.attempt.setup, wish.num_processes, wish.distributed)
        return dataclasses.replace(plan, attempt=dataclasses.replace(plan.attempt, setup=setup))

    monkeypatch.setattr(stack, "require", lambda what: None)
    monkeypatch.setattr(resumption, "prepare", prepare)
    # Full too: a wait for that would never end.
    machine = Machine(monkeypatch, used=80000, processes=[(42, 80000)])
    done = cli("runs", "resume", "large", "--runs", run.path.parent, "--num-processes", "1", "--wait")
    assert done.code == ExitCode.DOES_NOT_FIT
    assert done.err.count("\n") == 1
    assert "large: with 1 process the run needs" in done.err
    assert "GPU 0 (NVIDIA H100 80GB HBM3) has 79.18 GiB when nothing else is on it" in done.err
    assert machine.slept == 0
    assert not run.attempts.exists()


WAITS = """
import sys
from pathlib import Path
from launcher import cli
from launcher.runs import stack
from launcher.runs.kept import resumption
from planner.commands.program import run_as_program
from tests.unit.test_gpu_hardware import FakeNvml, h100
from tests.unit.test_gpu_room import prepared

sys.modules["pynvml"] = FakeNvml(h100(used=80000, processes=[(42, 80000)]))
stack.require = lambda what: None
resumption.prepare = prepared
arguments = ["runs", "resume", "one", "--runs", sys.argv[1], "--wait"]
run_as_program("vramwise", lambda: cli.run(arguments))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_the_wait_and_nothing_behind(run: RunFolder, number: signal.Signals) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*")}
    command = [sys.executable, "-c", WAITS, str(run.path.parent)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert "are missing on GPU 0" in waiting.stderr.readline()
        time.sleep(0.1)
        waiting.send_signal(number)
        rest = waiting.stderr.read()
        assert waiting.wait(60) == ExitCode.INTERRUPTED
    assert rest == "vramwise: interrupted\n"
    assert {path: path.read_bytes() for path in run.path.rglob("*")} == before
    assert json.loads(run.job.read_text())["model_source"] == "m"
