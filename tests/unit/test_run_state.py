"""Where a run stands: asked of the kernel's locks and of the ends of files, whatever is damaged or long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.runs import sampler, supervisor, tail
from launcher.runs.attempts import add_attempt, first_attempt
from launcher.runs.events import (
    NO_EVENT,
    AttemptEvent,
    CheckpointEvent,
    EndEvent,
    Event,
    LogEvent,
    SampleEvent,
    StartEvent,
    WarningEvent,
    append_event,
    from_line,
    to_line,
)
from launcher.runs.folder import RunBusyError, RunFolder, create_run_folder, hold_lock
from launcher.runs.heartbeat import HeartbeatWriter
from launcher.runs.locks import holder, live_pid
from launcher.runs.supervisor import status
from launcher.runs.tail import last_line_with, lines_from_the_end
from launcher.runs.training_job import TrainingJob
from planner.base.errors import InputError
from planner.setup.training_setup import TrainingSetup

JOB = TrainingJob(
    setup=TrainingSetup(model="demo", max_length=64), model_source="m", data_path="d.jsonl", max_steps=9
)


def make_run(root: Path, *events: Event) -> RunFolder:
    folder = create_run_folder(root, JOB, name="run")
    for event in events:
        append_event(folder.events, event)
    return folder


def log(step: int, loss: float | None = 1.0) -> LogEvent:
    return LogEvent(
        time=2.0,
        step=step,
        loss=loss,
        learning_rate=None,
        grad_norm=None,
        tokens_per_second=None,
        step_seconds=2.0,
    )


START = StartEvent(time=1.0, total_steps=9, environment={})


@contextmanager
def another_process_holds(folder: RunFolder, process: str) -> Iterator[int]:
    code = (
        "import sys; from pathlib import Path; from launcher.runs.folder import *\n"
        f"with hold_lock(RunFolder(Path({str(folder.path)!r})), {process!r}):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"held\n"
        try:
            yield one.pid
        finally:
            one.kill()


def test_status_follows_events_and_locks(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert status(folder.path).state == "created"
    with hold_lock(folder, "trainer"):
        assert status(folder.path).state == "starting"
        append_event(folder.events, START)
        append_event(folder.events, log(4))
        now = status(folder.path)
        assert (now.state, now.step, now.total_steps, now.pid) == ("running", 4, 9, os.getpid())
        assert (now.model, now.loss, now.alive) == ("demo", 1.0, True)
        with pytest.raises(RunBusyError, match="running"):
            supervisor.start(folder.path)
    now = status(folder.path)
    assert (now.state, now.alive, now.over) == ("killed", False, True)
    assert "after step 4; no checkpoint was written" in now.message
    append_event(folder.events, EndEvent(time=3.0, state="oom", message="CUDA out of memory", step=5))
    now = status(folder.path)
    assert (now.state, now.step, now.message) == ("oom", 5, "CUDA out of memory")


def test_a_keeper_without_a_trainer_is_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with hold_lock(folder, "keeper"):
        now = status(folder.path)
        assert (now.state, now.alive, now.pid, now.keeper_pid) == ("starting", True, None, os.getpid())
    assert status(folder.path).state == "killed"


@pytest.mark.parametrize("content", [b"", b"1\n", b"99999999\n", b"-1\n", b"0\n", b"\xff\x00", b"4242"])
def test_the_kernel_says_who_lives_and_not_a_file(tmp_path: Path, content: bytes) -> None:
    """A lock file cut, stale or with the pid of another process; and no trainer.json, whatever it says."""
    folder = make_run(tmp_path, START, log(4))
    (folder.path / "trainer.json").write_text('{"pid": 1, "create_time": 0}')
    with another_process_holds(folder, "trainer") as pid:
        folder.lock_file("trainer").write_bytes(content)
        now = status(folder.path)
        assert (now.state, now.pid) == ("running", pid)
    assert holder(folder.lock_file("trainer")) is None
    assert status(folder.path).state == "killed"


def test_where_the_kernel_names_no_pid_the_run_still_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a trainer in a container, and where there is no /proc/locks."""
    folder = make_run(tmp_path, START, log(4))
    (tmp_path / "locks").write_text("1: POSIX  ADVISORY  WRITE 77 08:01:131 0 EOF\nunlike\n")
    with hold_lock(folder, "trainer"):
        monkeypatch.setattr("launcher.runs.locks._PROC_LOCKS", tmp_path / "locks")
        now = status(folder.path)
        assert (now.state, now.alive, now.pid) == ("running", True, None)
        monkeypatch.setattr("launcher.runs.locks._PROC_LOCKS", tmp_path / "absent")
        assert live_pid(folder, "trainer") == os.getpid()


def test_a_forked_child_that_outlives_the_trainer_is_no_trainer(tmp_path: Path) -> None:
    folder = make_run(tmp_path, START)
    code = (
        "import os, sys; from pathlib import Path; from launcher.runs.folder import *\n"
        f"with hold_lock(RunFolder(Path({str(folder.path)!r})), 'trainer'):\n"
        "    if not os.fork(): sys.stdin.read(); os._exit(0)\n"
        "    os._exit(0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as one:
        one.wait()
        now = status(folder.path)
        assert (now.state, now.alive) == ("killed", False)


def test_to_ask_takes_nobodys_lock(tmp_path: Path) -> None:
    """A trainer that starts while others ask gets its lock."""
    folder = make_run(tmp_path)
    folder.lock_file("trainer").touch()
    with folder.lock_file("trainer").open() as asking:
        import fcntl

        fcntl.flock(asking, fcntl.LOCK_SH)
        assert holder(folder.lock_file("trainer")) is None
        with pytest.raises(RunBusyError), hold_lock(folder, "trainer"):
            pass
    with hold_lock(folder, "trainer"):
        assert live_pid(folder, "trainer") == os.getpid()


def test_a_new_attempt_is_a_new_life(tmp_path: Path) -> None:
    folder = make_run(tmp_path, START, log(4), EndEvent(time=3.0, state="hang", message="m", step=4))
    append_event(folder.events, AttemptEvent(time=4.0, number=2, reason="hang", from_step=3))
    with hold_lock(folder, "keeper"):
        now = status(folder.path)
        assert (now.state, now.step) == ("starting", 3)
        append_event(folder.events, StartEvent(time=5.0, total_steps=12, environment={}, first_step=3))
        now = status(folder.path)
        assert (now.state, now.step, now.total_steps) == ("running", 3, 12)


def test_the_time_left_is_at_the_pace_of_the_last_steps(tmp_path: Path, monkeypatch: Any) -> None:
    folder = make_run(tmp_path, START, log(1), log(4))
    monkeypatch.setattr("launcher.runs.state.time.time", lambda: 5.0)
    with hold_lock(folder, "trainer"):
        assert status(folder.path).seconds_left == pytest.approx(5 * 2.0 - 3.0)


FILES = ("job.json", "plan.json", "attempts.jsonl", "events.jsonl", ".trainer.lock", "heartbeat.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("alive", [False, True])
def test_no_damaged_file_hides_a_run(tmp_path: Path, name: str, alive: bool) -> None:
    """Each file cut at each byte, and removed: the state is told, and what is damaged is named."""
    checkpoint = CheckpointEvent(time=2.5, step=4, path="checkpoint-4")
    folder = make_run(tmp_path, START, log(4), checkpoint)
    add_attempt(folder.attempts, first_attempt(JOB))
    folder.plan.write_text('{"version": 1}')
    with HeartbeatWriter(folder.heartbeat) as beats:
        beats.beat("training", 4)
    (folder.lock_file("trainer")).write_text("1234\n")
    path = folder.path / name
    whole = path.read_bytes()
    told = set()
    with hold_lock(folder, "trainer" if alive else "launcher"):
        # Each byte of a dead run, some of one that lives: the same files are read.
        for length in range(0, len(whole), 11 if alive else 1):
            path.write_bytes(whole[:length])
            now = status(folder.path)
            told.add(now.state)
            cut = whole[:length]
            if name == "job.json" and not _is_job(cut):
                assert "damaged: job.json" in now.message
                assert (now.state, now.step) == ("running" if alive else "killed", 4)
            if alive:
                assert now.pid == os.getpid()
        path.unlink()
        if name != ".trainer.lock":
            told.add(status(folder.path).state)
    assert told <= ({"running", "starting"} if alive else {"killed"})


def _is_job(content: bytes) -> bool:
    try:
        TrainingJob.from_dict(json.loads(content))
    except (ValueError, InputError):
        return False
    return True


def test_without_events_heartbeat_and_adapter_speak(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with HeartbeatWriter(folder.heartbeat) as beats, hold_lock(folder, "trainer"):
        beats.beat("saving", 9)
        assert (status(folder.path).state, status(folder.path).step) == ("running", 9)
    folder.adapter.mkdir()
    now = status(folder.path)
    assert (now.state, now.step) == ("unknown", 9)
    assert "adapter is there" in now.message


@pytest.mark.parametrize(
    "line",
    [
        '{"time": 1, "kind": "log", "step": "x"}',
        '{"time": 1, "kind": "end", "state": 3, "message": "", "step": 1}',
        '{"time": 1, "kind": "end", "state": "oom", "message": null, "step": 1}',
        '{"time": 1, "kind": "start", "total_steps": true, "environment": {}}',
        '{"time": 1, "kind": "start", "total_steps": 1' + "0" * 400 + ', "environment": {}}',
        '{"time": NaN, "kind": "warning", "message": "x"}',
        '{"time": 1, "kind": ["log"]}',
        "[" * 100_000,
    ],
)
def test_an_event_of_wrong_types_is_none(line: str, tmp_path: Path) -> None:
    assert from_line(line) == WarningEvent(time=0.0, message=NO_EVENT)
    folder = make_run(tmp_path, START, log(2))
    with folder.events.open("a") as file:
        file.write(line + "\n")
    assert status(folder.path).step == 2


def test_a_long_run_is_listed_from_its_ends(tmp_path: Path) -> None:
    """The state of 100,000 steps in two attempts: in little memory, and from few lines."""
    folder = make_run(tmp_path, START)
    with folder.events.open("a") as file:
        for step in range(50_000):
            file.write(to_line(log(step)))
        second = (
            AttemptEvent(time=3.0, number=2, reason="resume", from_step=49_000),
            StartEvent(time=4.0, total_steps=200_000, environment={}, first_step=49_000),
            CheckpointEvent(time=4.0, step=49_500, path="checkpoint-49500"),
        )
        file.writelines(to_line(event) for event in second)
        for step in range(49_000, 99_000):
            file.write(to_line(log(step)))
    add_attempt(folder.attempts, first_attempt(JOB))
    add_attempt(folder.attempts, first_attempt(JOB))
    tracemalloc.start()
    now = status(folder.path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (now.step, now.total_steps) == (98_999, 200_000)
    assert "the last checkpoint is of step 49500" in now.message
    assert peak < 8 * 2**20


@given(
    lines=st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=20),
    rest=st.binary(max_size=9).filter(lambda rest: b"\n" not in rest),
    block=st.integers(1, 7),
    skip=st.integers(0, 5),
)
def test_lines_come_from_the_end_as_from_the_beginning(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], rest: bytes, block: int, skip: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + rest)
    down_to = sum(len(line) + 1 for line in lines[:skip])
    expected = [line for line in reversed(lines[skip:]) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "BLOCK_BYTES", block)
        assert list(lines_from_the_end(path, down_to=down_to)) == expected
        found = last_line_with(path, b"\x01\x02")
    assert found == next((line for line in reversed(lines) if b"\x01\x02" in line), None)


def test_a_sampler_that_is_started_again_knows_what_others_used_before(tmp_path: Path) -> None:
    """Of the present trainer's samples, and not of those of an attempt before it."""
    folder = make_run(tmp_path)
    assert sampler._used_before(folder) is None
    with hold_lock(folder, "trainer"):
        began = folder.lock_file("trainer").stat().st_mtime
        for time, used, own in (
            (began - 100, 9, 1),
            (began + 1, None, 5),
            (began + 2, 7, 3),
            (began + 3, 8, 1),
        ):
            one = SampleEvent(time=time, used_bytes=used, total_bytes=10, process_bytes=own)
            append_event(folder.samples, one)
        assert sampler._used_before(folder) == 4
