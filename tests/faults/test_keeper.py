"""The keeper under faults: real processes, with stand-ins for trainer and sampler (stand_ins.py)."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from launcher.runs import keeper, supervisor
from launcher.runs.attempts import add_attempt, first_attempt, read_attempts
from launcher.runs.ends import RunExit
from launcher.runs.events import (
    CheckpointEvent,
    EndEvent,
    LogEvent,
    WarningEvent,
    append_event,
    read_events,
)
from launcher.runs.folder import RunFolder, create_run_folder
from launcher.runs.keeper import HANG_RESTARTS, AttemptEnd, Keeper, next_attempt
from launcher.runs.locks import live_pid
from launcher.runs.minding import stopping
from launcher.runs.minding.deaths import KillCounters, read_kill_counters, signal_name
from launcher.runs.supervisor import status
from launcher.runs.training_job import TrainingJob
from planner.setup.training_setup import TrainingSetup
from tests.faults import stand_ins

JOB = TrainingJob(
    setup=TrainingSetup(model="demo", max_length=64), model_source="m", data_path="d.jsonl", max_steps=9
)
PROCESSES = ("trainer", "keeper", "sampler")


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.05)


def make_run(root: Path, **order: Any) -> RunFolder:
    folder = create_run_folder(root, JOB, name="run")
    stand_ins.order(folder, **order)
    return folder


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Stand-ins for all processes; none of them is left when the test is over."""
    monkeypatch.setattr(supervisor, "spawn", stand_ins.spawn_stand_in)
    yield
    for folder in map(RunFolder, tmp_path.glob("*/")):
        for process in PROCESSES:
            if (pid := live_pid(folder, process)) is not None:
                os.kill(pid, signal.SIGKILL)


def start(folder: RunFolder) -> supervisor.RunHandle:
    handle = supervisor.start(folder.path)
    wait_until(lambda: status(folder.path).step >= 1)
    return handle


def the_end(folder: RunFolder) -> EndEvent:
    (end,) = [event for event in read_events(folder.events) if isinstance(event, EndEvent)]
    return end


def nobody_left(folder: RunFolder) -> bool:
    return all(live_pid(folder, process) is None for process in PROCESSES)


def test_a_run_needs_nobody_and_leaves_nobody(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=20)
    handle = supervisor.start(folder.path)
    assert handle.wait(120).state == "finished"
    assert handle.keeper.wait(60) == RunExit.FINISHED
    assert [attempt.reason for attempt in read_attempts(folder.attempts)] == ["start"]
    wait_until(lambda: nobody_left(folder))
    with pytest.raises(Exception, match="started before and is finished"):
        supervisor.start(folder.path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGUSR2, signal.SIGXCPU])
def test_the_signal_that_ended_the_trainer_is_named(tmp_path: Path, number: signal.Signals) -> None:
    by = signal.SIGABRT if number == signal.SIGUSR2 else number
    folder = make_run(tmp_path, dies_at=5, by=by, saves=2)
    handle = supervisor.start(folder.path)
    now = handle.wait(120)
    assert (now.state, now.step) == ("killed", 4)
    assert by.name in now.message
    assert "the last checkpoint is of step 4" in now.message
    assert str(folder.checkpoints / "checkpoint-4") in now.message
    assert handle.keeper.wait(60) == RunExit.KILLED
    assert the_end(folder).state == "killed"
    # Nobody followed it: the report is the keeper's.
    report, page = json.loads(folder.report.read_text()), folder.report_page.read_text()
    assert (report["state"], report["steps"], report["reason"]) == ("killed", 4, now.message)
    assert page.startswith("# run: killed\n")
    for words in (by.name, "of step 2, 4", "vramwise runs resume run", folder.loss_curve.name):
        assert words in page
    (line,) = ET.parse(folder.loss_curve).iter("{http://www.w3.org/2000/svg}polyline")
    assert len(line.attrib["points"].split()) == 4
    wait_until(lambda: nobody_left(folder))


def test_an_end_is_told_though_the_job_is_gone_by_then(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    handle = start(folder)
    folder.job.unlink()
    trainer = live_pid(folder, "trainer")
    assert trainer is not None
    os.kill(trainer, signal.SIGKILL)
    assert handle.keeper.wait(60) == RunExit.KILLED
    assert the_end(folder).state == "killed"
    wait_until(lambda: nobody_left(folder))


def test_a_sampler_that_dies_is_started_again_and_given_up_at_last(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    handle = start(folder)
    seen: set[int] = set()
    for _ in range(keeper.SAMPLER_RESTARTS + 1):

        def another() -> bool:
            pid = live_pid(folder, "sampler")
            return pid is not None and pid not in seen

        wait_until(another)
        pid = live_pid(folder, "sampler")
        assert pid is not None
        seen.add(pid)
        os.kill(pid, signal.SIGKILL)

    def warnings() -> list[str]:
        return [event.message for event in read_events(folder.events) if isinstance(event, WarningEvent)]

    wait_until(lambda: len(warnings()) == keeper.SAMPLER_RESTARTS + 1)
    assert all("the sampler ended (SIGKILL)" in message for message in warnings())
    assert "no more samples" in warnings()[-1]
    assert status(folder.path).state == "running"
    supervisor.request_stop(folder.path)
    assert handle.wait(120).state == "stopped"


def test_a_run_whose_keeper_is_killed_goes_on_can_be_stopped_and_leaves_nobody(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    handle = start(folder)
    wait_until(lambda: live_pid(folder, "sampler") is not None)
    handle.keeper.kill()
    handle.keeper.wait()
    step = status(folder.path).step
    wait_until(lambda: status(folder.path).step > step + 3)
    now = status(folder.path)
    assert (now.state, now.alive, now.keeper_pid) == ("running", True, None)
    assert handle.goes_on()
    supervisor.request_stop(folder.path)
    assert handle.wait(120).state == "stopped"
    wait_until(lambda: nobody_left(folder))


def test_without_a_keeper_an_end_at_once_still_comes(tmp_path: Path) -> None:
    folder = make_run(tmp_path, deaf=True)
    handle = start(folder)
    handle.keeper.kill()
    handle.keeper.wait()
    assert supervisor.kill(folder.path, patience_seconds=1.0)
    assert status(folder.path).state == "killed"
    wait_until(lambda: nobody_left(folder))
    assert not supervisor.kill(folder.path)


def test_a_keeper_killed_before_the_trainer_is_ready_leaves_a_run_that_is_truly_listed(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path, loads_for=1.0)
    handle = supervisor.start(folder.path)
    wait_until(lambda: folder.log("trainer").exists())
    handle.keeper.kill()
    handle.keeper.wait()
    wait_until(lambda: live_pid(folder, "trainer") is not None)
    assert status(folder.path).alive
    supervisor.kill(folder.path, patience_seconds=5.0)
    assert not status(folder.path).alive


@pytest.mark.parametrize("whom", ["trainer", "keeper"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_saves_and_is_no_success(tmp_path: Path, whom: str, number: signal.Signals) -> None:
    folder = make_run(tmp_path)
    handle = start(folder)
    pid = live_pid(folder, whom)
    assert pid is not None
    os.kill(pid, number)
    now = handle.wait(120)
    assert now.state == "stopped"
    assert handle.keeper.wait(60) == RunExit.STOPPED_SAVED == 130
    last = next(event for event in reversed(read_events(folder.events)) if isinstance(event, CheckpointEvent))
    assert last.step == now.step
    assert folder.adapter.is_dir()


def test_what_a_scheduler_sends_to_all_processes_at_once_saves(tmp_path: Path) -> None:
    """Slurm warns, and then sends SIGTERM, to everything of the job."""
    folder = make_run(tmp_path, step_seconds=0.5)
    handle = start(folder)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for process in PROCESSES[:2]:
            pid = live_pid(folder, process)
            assert pid is not None
            os.kill(pid, number)
    assert handle.wait(120).state == "stopped"


def test_a_trainer_that_is_still_loading_is_ended_at_once(tmp_path: Path) -> None:
    """Before it holds its lock its pid is known to the keeper alone."""
    folder = make_run(tmp_path, loads_for=600)
    handle = supervisor.start(folder.path)
    wait_until(lambda: folder.log("trainer").exists())
    assert supervisor.kill(folder.path)
    now = handle.wait(120)
    assert (now.state, now.alive) == ("interrupted", False)
    assert handle.keeper.wait(60) == RunExit.STOPPED_UNSAVED
    assert "no checkpoint was written" in now.message


def test_a_trainer_that_does_not_react_is_killed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, deaf=True, patience=0.5, saves=1)
    handle = start(folder)
    stopping.ask(folder, stopping.NOW)
    now = handle.wait(120)
    assert now.state == "interrupted"
    assert "SIGKILL" in now.message
    assert "the last checkpoint is of step" in now.message
    wait_until(lambda: nobody_left(folder))


def test_a_frozen_keeper_does_not_keep_a_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "KEEPER_ANSWERS_SECONDS", 0.5)
    monkeypatch.setattr(stopping, "PATIENCE_SECONDS", 0.1)
    folder = make_run(tmp_path)
    handle = start(folder)
    handle.keeper.send_signal(signal.SIGSTOP)
    supervisor.kill(folder.path, patience_seconds=2.0)
    assert live_pid(folder, "trainer") is None
    handle.keeper.kill()


HANG = {"floor_seconds": 4.0, "factor": 10.0, "known_after": 3, "unmeasured_seconds": 4.0}


def test_a_hang_is_ended_with_its_stacks_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=12, hangs_at=9, saves=4, limits=HANG, patience=0.3)
    handle = supervisor.start(folder.path)
    now = handle.wait(240)
    assert (now.state, now.step, now.attempts) == ("finished", 12, 2)
    hang, end = [event for event in read_events(folder.events) if isinstance(event, EndEvent)]
    assert (hang.state, hang.step, end.state) == ("hang", 8, "finished")
    assert "no sign of life for" in hang.message
    assert "while training" in hang.message
    assert "started again from step 8" in hang.message
    second = read_attempts(folder.attempts)[1]
    assert (second.number, second.reason, second.from_step) == (2, "hang", 8)
    steps = [event.step for event in read_events(folder.events) if isinstance(event, LogEvent)]
    assert steps == [*range(1, 9), *range(9, 13)]
    assert "in _trainer" in folder.log("trainer").read_text()
    assert handle.keeper.wait(60) == RunExit.FINISHED


def test_a_hang_without_progress_is_given_up(tmp_path: Path) -> None:
    """What follows each hang, and when nothing does; a stop that was asked for is not undone by a restart."""
    folder = make_run(tmp_path)
    add_attempt(folder.attempts, first_attempt(JOB))
    hang = AttemptEnd(state="hang", message="", step=7)
    made = []
    for _ in range(HANG_RESTARTS):
        following = next_attempt(folder, hang)
        assert following is not None
        made.append((following.number, following.reason, following.from_step))
        add_attempt(folder.attempts, following)
    assert made == [(2, "hang", 0), (3, "hang", 0), (4, "hang", 0)]
    assert next_attempt(folder, hang) is None
    # A checkpoint is progress, if it is whole.
    saved = stand_ins.save(folder, 6)
    weights = saved / stand_ins.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    append_event(folder.events, CheckpointEvent(time=1.0, step=6, path=str(saved)))
    assert next_attempt(folder, hang) is None
    weights.write_bytes(whole)
    following = next_attempt(folder, hang)
    assert following is not None
    assert (following.number, following.from_step, following.setup) == (5, 6, JOB.setup)
    for state in ("finished", "stopped", "interrupted", "killed", "diverged", "refused", "failed"):
        assert next_attempt(folder, dataclasses.replace(hang, state=state)) is None
    assert next_attempt(folder, dataclasses.replace(hang, gone=False)) is None


def test_the_last_hang_is_the_end(tmp_path: Path) -> None:
    folder = make_run(tmp_path, hangs_at=5, hangs=99, limits=HANG, patience=0.2)
    attempt = first_attempt(JOB)
    handle = supervisor.start(folder.path)
    wait_until(lambda: live_pid(folder, "trainer") is not None)
    for number in range(2, HANG_RESTARTS + 2):
        # As if it had been restarted that often.
        add_attempt(folder.attempts, dataclasses.replace(attempt, number=number, reason="hang"))
    now = handle.wait(240)
    assert now.state == "hang"
    assert "given up" in now.message
    assert handle.keeper.wait(60) == RunExit.HANG
    wait_until(lambda: nobody_left(folder))


class Unkillable(subprocess.Popen[bytes]):
    """A process in the state D: no signal reaches it."""

    def send_signal(self, sig: int) -> None:
        """Lost."""


def in_process(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Keeper:
    """A keeper in this process, whose signals stay as they are."""
    monkeypatch.setattr(keeper.Keeper, "_take_signals", lambda self: None)
    add_attempt(folder.attempts, first_attempt(JOB))
    values = {
        "start_trainer": lambda: stand_ins.spawn_stand_in(folder, "trainer", ""),
        "start_sampler": lambda: stand_ins.spawn_stand_in(folder, "sampler", ""),
        **changes,
    }
    return Keeper(folder, **values)


def test_a_trainer_that_nothing_ends_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path, sampler_dies=True)
    process: list[Unkillable] = []

    def stuck() -> Unkillable:
        process.append(Unkillable([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return process[0]

    limits = keeper.HangLimits(loading_seconds=0.5)
    code = in_process(folder, monkeypatch, start_trainer=stuck, limits=limits, patience_seconds=0.1).keep()
    assert code == RunExit.HANG
    message = the_end(folder).message
    assert f"process {process[0].pid} cannot be ended even by SIGKILL" in message
    assert "reboot" in message
    process[0].communicate(b"\n")


@pytest.mark.parametrize(
    ("after", "state", "words"),
    [
        (KillCounters(1, 0), "oom", "the control group's memory ran out"),
        (KillCounters(0, 1), "killed", "SIGKILL"),
        (KillCounters(None, 1), "oom", "the machine's memory ran out"),
        (KillCounters(None, 0), "killed", "SIGKILL"),
        (KillCounters(None, None), "killed", "SIGKILL"),
    ],
)
def test_the_kernel_that_ran_out_of_memory_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: KillCounters, state: str, words: str
) -> None:
    folder = make_run(tmp_path, dies_at=2, by=signal.SIGKILL, sampler_dies=True)
    before = KillCounters(None if after.in_group is None else 0, None if after.on_machine is None else 0)
    counts = iter([before, after])
    code = in_process(folder, monkeypatch, count_kills=lambda: next(counts)).keep()
    end = the_end(folder)
    assert (end.state, code == RunExit.OOM) == (state, state == "oom")
    assert words in end.message
    assert ("memory of the host and not of the GPU" in end.message) == (state == "oom")


def test_a_trainer_that_cannot_begin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, sampler_dies=True)

    def broken() -> subprocess.Popen[bytes]:
        with folder.log("trainer").open("ab") as log:
            code = "import sys; sys.exit('the library is not the one that was built')"
            return subprocess.Popen([sys.executable, "-c", code], stderr=log, start_new_session=True)

    assert in_process(folder, monkeypatch, start_trainer=broken).keep() == RunExit.BUG
    assert the_end(folder).message == "the library is not the one that was built"


def test_lost_events_do_not_lose_the_end(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=60, step_seconds=0.05)
    handle = start(folder)
    folder.events.unlink()
    now = handle.wait(120)
    assert now.state == "finished"
    assert handle.keeper.wait(60) == RunExit.FINISHED


def test_kill_counters_are_read_where_the_kernel_has_them(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("pgfault 7\noom_kill 3\n")
    two = tmp_path / "two"
    (two / "a" / "b").mkdir(parents=True)
    (two / "a" / "b" / "memory.events").write_text("oom 9\noom_kill 2\noom_group_kill 0\n")
    one = tmp_path / "one"
    (one / "memory").mkdir(parents=True)
    (one / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    group = tmp_path / "cgroup"
    for text, groups, expected in (
        ("0::/a/b\n", two, 2),
        ("4:memory:/elsewhere\n0::/\n", one, 5),
        ("", two, None),
        ("broken\n", two, None),
    ):
        group.write_text(text)
        found = read_kill_counters(group=group, groups=groups, machine=vmstat)
        assert (found.in_group, found.on_machine) == (expected, 3)
    absent = tmp_path / "absent"
    assert read_kill_counters(group=absent, groups=absent, machine=absent) == KillCounters(None, None)
    assert signal_name(9) == "SIGKILL"
    assert signal_name(99) == "signal 99"


def test_the_keeper_imports_no_training_stack_and_no_driver() -> None:
    heavy = ("torch", "transformers", "trl", "pynvml", "numpy", "psutil")
    code = f"import sys, launcher.runs.keeper; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
