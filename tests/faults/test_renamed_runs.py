"""A run folder that is renamed while the run goes on: keeper, sampler and who follows it go with it."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.runs import supervisor
from launcher.runs.attempts import read_attempts
from launcher.runs.ends import RunExit
from launcher.runs.events import EndEvent, SampleEvent, WarningEvent, read_events
from launcher.runs.folder import RunFolder
from launcher.runs.locks import is_alive, live_pid
from launcher.runs.supervisor import status
from tests.faults import stand_ins
from tests.faults.test_keeper import HANG, PROCESSES, make_run, nobody_left, wait_until
from tests.faults.test_keys import Terminal, command, train, wait_for_steps


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Stand-ins for all processes; none of them is left when the test is over."""
    monkeypatch.setattr(supervisor, "spawn", stand_ins.spawn_stand_in)
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "own"))
    yield
    for folder in map(RunFolder, tmp_path.rglob("*/")):
        for process in PROCESSES:
            if (pid := live_pid(folder, process)) is not None:
                os.kill(pid, signal.SIGKILL)


def renamed(folder: RunFolder) -> RunFolder:
    there = RunFolder(folder.path.with_name("renamed"))
    folder.path.rename(there.path)
    return there


def shows_steps(terminal: Terminal) -> bool:
    return re.search(r"step \d+/", terminal.text) is not None


def samples(folder: RunFolder) -> int:
    return sum(isinstance(event, SampleEvent) for event in read_events(folder.samples))


def test_keeper_and_sampler_go_with_a_renamed_run_to_its_end(tmp_path: Path) -> None:
    """Silence of 4 s is a hang here: a keeper that looks in the old place would end the run."""
    folder = make_run(tmp_path, saves=4, limits=HANG, late_step=12, late_seconds=1.0)
    handle = supervisor.start(folder.path)
    wait_until(lambda: status(folder.path).step >= 5 and samples(folder) >= 1)
    there = renamed(folder)
    seen, step = samples(there), status(there.path).step
    wait_until(lambda: samples(there) > seen + 1 and status(there.path).step > step + 5)
    assert {live_pid(there, process) is not None for process in PROCESSES} == {True}
    os.kill(live_pid(there, "trainer") or 0, signal.SIGKILL)
    wait_until(lambda: nobody_left(there))
    assert handle.keeper.wait(60) == RunExit.KILLED
    assert not folder.path.exists()
    now = status(there.path)
    assert now.state == "killed"
    assert f"({there.checkpoints / 'checkpoint-'}" in now.message.replace(str(now.step // 4 * 4), "")
    told = [event for event in read_events(there.events) if isinstance(event, EndEvent | WarningEvent)]
    assert [event.kind for event in told] == ["end"]
    assert len(read_attempts(there.attempts)) == 1
    report = json.loads(there.report.read_text())
    assert (report["run"], report["folder"], report["state"]) == ("renamed", str(there.path), "killed")
    assert "vramwise runs resume renamed" in there.report_page.read_text()


def test_a_renamed_run_that_hangs_is_started_again_where_it_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=14, hangs_at=10, saves=4, limits=HANG, patience=0.3)
    handle = supervisor.start(folder.path)
    wait_until(lambda: status(folder.path).step >= 2)
    there = renamed(folder)
    assert handle.keeper.wait(240) == RunExit.FINISHED
    now = status(there.path)
    assert (now.state, now.step, now.attempts) == ("finished", 14, 2)
    assert read_attempts(there.attempts)[1].from_step == 8


def test_stop_by_the_new_name_reaches_a_renamed_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    handle = supervisor.start(folder.path)
    wait_until(lambda: status(folder.path).step >= 1)
    there = renamed(folder)
    supervisor.request_stop(there.path)
    assert handle.keeper.wait(120) == RunExit.STOPPED_SAVED
    assert status(there.path).state == "stopped"
    assert there.adapter.is_dir()


def test_who_starts_and_who_follows_a_run_that_is_renamed_see_its_end(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    starter, folder = train(root)
    wait_for_steps(folder, 1)
    follower = Terminal(*command("runs", "follow", "run", "--runs", str(root)))
    wait_until(lambda: all(map(shows_steps, (starter, follower))))
    there = renamed(folder)
    supervisor.request_stop(there.path)
    assert [starter.code(), follower.code()] == [RunExit.STOPPED_SAVED, RunExit.STOPPED_SAVED]
    for text in (starter.text, follower.text):
        assert "Stopped after " in text
        assert str(there.report_page) in text.replace("\r\n", "").replace(" ", "")
        assert "/proc/" not in text
    assert json.loads(there.report.read_text())["folder"] == str(there.path)


def test_ctrl_c_ends_a_run_that_was_renamed(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    starter, folder = train(root)
    wait_until(lambda: shows_steps(starter))
    there = renamed(folder)
    starter.press_ctrl_c()
    assert starter.code() == RunExit.STOPPED_SAVED
    assert status(there.path).state == "stopped"
    assert not is_alive(there)
