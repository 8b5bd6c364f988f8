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
from launcher.runs.events import AdapterEvent, CheckpointEvent, EndEvent, LogEvent, StageEvent
from launcher.runs.folder import RunFolder
from launcher.runs.minding import ranks as minded
from launcher.runs.minding.hang import HangLimits
from launcher.training.several.ranks import AGENT as AGENT_VARIABLE
from tests import forks
from tests.faults import ranks, small_runs
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


def host(root: Path, node_rank: int, endpoint: str) -> RunFolder:
    return long_run(root, f"host-{node_rank}", nnodes=2, node_rank=node_rank, rdzv_endpoint=endpoint)


def test_a_host_that_does_not_exist_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    run = host(tmp_path, 1, "no-such-host.invalid:29500")
    handle = supervisor.start(run.path)
    assert handle.wait(200).state == "refused"
    assert handle.keeper.wait() == RunExit.BAD_INPUT
    assert end_of(run).message.startswith("--rdzv-endpoint no-such-host.invalid:29500: no such host or port")
    assert "\n" not in end_of(run).message


def agent_that_waits(run: Path, seconds: int) -> int:
    from launcher.training.several import agent, meeting

    meeting.MEETING_SECONDS = seconds
    return agent.main([str(run)])


@pytest.mark.parametrize(
    ("node_rank", "said"),
    [(0, "1/2 clients joined): all are to be started"), (1, "is the run with --node-rank 0 started")],
)
def test_a_machine_that_is_left_alone_says_so_in_one_line(tmp_path: Path, node_rank: int, said: str) -> None:
    endpoint = f"127.0.0.1:{ranks.free_port()}"
    run = host(tmp_path, node_rank, endpoint)
    process = forks.start(agent_that_waits, run.path, 1, output=run.log("trainer"))
    process.join(200)
    assert process.exitcode == RunExit.BAD_INPUT
    last = run.log("trainer").read_text().splitlines()[-1]
    assert last.startswith(f"the machines did not meet at {endpoint} (")
    assert said in last


def test_a_request_to_end_leaves_the_wait_for_other_machines(tmp_path: Path) -> None:
    run = host(tmp_path, 0, f"127.0.0.1:{ranks.free_port()}")
    agent = forks.start(agent_that_waits, run.path, 600, output=run.log("trainer"))
    wait_until(lambda: events_of(run, StageEvent))
    assert events_of(run, StageEvent)[0].message.startswith("waiting for another machine at 127.0.0.1:")
    supervisor.request_stop(run.path)
    agent.join(60)
    assert agent.exitcode == RunExit.STOPPED_SAVED
    assert run.log("trainer").read_text().splitlines()[-1].startswith("stopped while waiting")


def agent_that_runs_timeit(run: Path) -> int:
    """The agent of a run, whose ranks run a module of the standard library in place of the trainer."""
    from launcher.training.several import agent

    os.chdir(run)
    asked = agent.torchrun_arguments
    agent.torchrun_arguments = lambda job, folder: [*asked(job, folder)[:-2], "timeit", "-n1", "-r1", "pass"]
    return agent.main([str(run)])


def test_a_file_beside_the_user_s_data_shadows_no_library_of_a_rank(tmp_path: Path) -> None:
    """torchrun starts `python -m`, which looks in the folder that it was started in first."""
    run = long_run(tmp_path, "run")
    (run.path / "timeit.py").write_text("raise SystemExit(7)\n")
    process = forks.start(agent_that_runs_timeit, run.path, output=run.log("trainer"))
    process.join(200)
    assert process.exitcode == 0, run.log("trainer").read_text()


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


def test_a_rank_whose_agent_died_before_it_began_is_no_orphan(tmp_path: Path) -> None:
    """As when the agent is killed while its ranks are still starting Python: nothing would end them."""
    run = long_run(tmp_path, "run")
    gone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", AGENT_VARIABLE: str(2**22 + 1)}
    rank = small_runs.start(run, environment=gone)
    assert small_runs.code_of(rank) == RunExit.KILLED
    assert minded.live_ranks(run, 2) == {}
    assert not run.events.exists()


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
