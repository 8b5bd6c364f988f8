"""Runs whose ranks torchrun starts: the keeper, its agent and the ranks, as real processes on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import keeper, supervisor
from launcher.runs.ends import RunExit
from launcher.runs.events import AdapterEvent, CheckpointEvent, EndEvent, LogEvent
from launcher.runs.folder import RunFolder
from launcher.runs.minding import ranks as minded
from launcher.runs.minding.hang import HangLimits
from tests.faults import ranks
from tests.faults.small_runs import SETUP, events_of, make_run

pytestmark = pytest.mark.slow


def wait_until(condition: Callable[[], object], seconds: float = 250.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.1)


def long_run(root: Path, name: str, **changes: Any) -> RunFolder:
    """A run on two ranks that does not end by itself."""
    setup = ranks.shared(SETUP, "ddp")
    return make_run(root, name=name, setup=setup, num_train_epochs=1e5, save_steps=10**6, **changes)


def end_of(run: RunFolder) -> EndEvent:
    (end,) = events_of(run, EndEvent)
    return end


def nothing_is_left(run: RunFolder) -> bool:
    """Whether no process has the run's folder in its command line."""
    told = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return str(run.path) not in told


def test_two_hosts_train_together_and_stop_when_one_of_them_is_asked(tmp_path: Path) -> None:
    port = ranks.free_port()
    hosts = [
        long_run(tmp_path, f"host-{rank}", nnodes=2, node_rank=rank, rdzv_endpoint=f"127.0.0.1:{port}")
        for rank in range(2)
    ]
    handles = [supervisor.start(run.path) for run in hosts]
    wait_until(lambda: all(events_of(run, LogEvent) for run in hosts) or not handles[0].goes_on())
    # As Ctrl-C there would.
    supervisor.request_stop(hosts[1].path)
    for handle in handles:
        handle.wait(200)
    assert [end_of(run).state for run in hosts] == ["stopped", "stopped"], (
        hosts[0].log("trainer").read_text()[-2000:]
    )
    # The first host saves, once.
    assert [len(events_of(run, CheckpointEvent)) for run in hosts] == [1, 0]
    assert [len(events_of(run, AdapterEvent)) for run in hosts] == [1, 0]
    assert hosts[0].adapter.is_dir()
    assert not hosts[1].adapter.exists()
    shared = min(len(ranks.figures(run, "loss")) for run in hosts)
    assert ranks.figures(hosts[0], "loss")[:shared] == ranks.figures(hosts[1], "loss")[:shared]
    wait_until(lambda: all(map(nothing_is_left, hosts)), 60)


def test_a_killed_rank_ends_the_run_and_is_told_by_its_number_and_signal(tmp_path: Path) -> None:
    run = long_run(tmp_path, "run")
    handle = supervisor.start(run.path)
    wait_until(lambda: events_of(run, LogEvent) or not handle.goes_on())
    victim = minded.live_ranks(run, 2)[1]
    os.kill(victim, signal.SIGKILL)
    assert handle.wait(200).state == "killed"
    end = end_of(run)
    assert f"rank 1 of 2 (process {victim}) was ended by SIGKILL after step" in end.message
    assert handle.keeper.wait() == RunExit.KILLED
    wait_until(lambda: nothing_is_left(run), 60)


AGENT = """
import os, sys, time
def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
while any(alive(int(pid)) for pid in sys.argv[1:]):
    time.sleep(0.1)
sys.exit(1)
"""
"""In torchrun's place: ends when its ranks have."""


def test_a_frozen_rank_is_a_hang_and_every_rank_s_stacks_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "HANG_RESTARTS", 0)
    run = long_run(tmp_path, "run")
    started: list[BaseProcess] = []

    def start() -> subprocess.Popen[bytes]:
        started.extend(ranks.start(run))
        threading.Thread(target=freeze, daemon=True).start()
        return subprocess.Popen([sys.executable, "-c", AGENT, *(str(rank.pid) for rank in started)])

    def freeze() -> None:
        wait_until(lambda: len(events_of(run, LogEvent)) > 8)
        os.kill(started[1].pid or 0, signal.SIGSTOP)

    minding = keeper.Keeper(
        run,
        start_trainer=start,
        start_sampler=lambda: subprocess.Popen(["sleep", "1000"]),
        limits=HangLimits(floor_seconds=5.0, factor=3.0, unmeasured_seconds=60.0),
        patience_seconds=3.0,
        ranks_here=lambda: 2,
    )
    taken = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in taken}
    try:
        assert minding.keep() == RunExit.HANG
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for rank in started:
            rank.kill()
            rank.join(60)
    assert events_of(run, EndEvent)[-1].state == "hang"
    log = run.log("trainer").read_text()
    for local, rank in enumerate(started):
        told = log.split(f"stacks of local rank {local} (process {rank.pid}):")[1]
        assert told.lstrip().startswith(("Thread", "Current thread"))
        assert "most recent call first" in told
