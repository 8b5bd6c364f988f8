"""Real file systems that refuse: a small one that is full, and one that becomes read-only."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from launcher.runs import supervisor
from launcher.runs.ends import RunExit
from launcher.runs.events import CheckpointEvent, StageEvent, WarningEvent
from launcher.runs.folder import RunFolder
from launcher.runs.heartbeat import read_beat
from launcher.runs.kept import checkpoints
from planner.base.errors import ExitCode
from planner.commands.program import guarded
from tests import forks, mounts
from tests.faults import broken_steps, small_runs, stand_ins
from tests.faults.small_runs import code_of, differences, events_of, make_run, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN = {"examples": 5, "save_steps": 2}


@pytest.fixture(autouse=True)
def can_mount() -> None:
    mounts.needs_mounts()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    mounts.needs_mounts()
    run = make_run(tmp_path_factory.mktemp("whole"), **RUN)
    assert trained(run) == RunExit.FINISHED
    return run


def tries_often() -> None:
    from launcher.training.watching import patience

    patience.RETRY_SECONDS = 0.3


def wait_until(condition: Callable[[], object], trainer: BaseProcess) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert trainer.is_alive(), trainer.exitcode
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.1)


def train_on_a_small_disk(place: Path, size: str, enough: Path, kept: Path) -> int:
    """All of a run on a file system without room for a checkpoint, until `enough` is there; in the end the
    run is copied to `kept`.
    """
    mounts.mount_tmpfs(place, size)
    mounts.remount_once(enough, place, "64m")
    run = make_run(place, **RUN)
    code = small_runs.train(run.path, tries_often)
    shutil.copytree(run.path, kept)
    return code


def train_beside_a_read_only_disk(run: Path, enough: Path) -> int:
    """A run whose checkpoints are on a file system that becomes read-only in the first step."""
    place = RunFolder(run).checkpoints
    place.mkdir()
    mounts.mount_tmpfs(place, "64m")
    mounts.remount_once(enough, place, "64m")
    tries_often()
    broken_steps.does_after(1, functools.partial(mounts.remount, place, read_only=True))
    return small_runs.train(run, None)


def test_a_run_on_a_full_file_system_waits_with_all_in_memory(tmp_path: Path, whole: RunFolder) -> None:
    place, enough, kept = tmp_path / "small", tmp_path / "enough", tmp_path / "kept"
    place.mkdir()
    arguments = (place, "400k", enough, kept)
    trainer = forks.start(train_on_a_small_disk, *arguments, output=tmp_path / "log")

    def run() -> RunFolder:
        assert trainer.pid is not None
        return RunFolder(mounts.seen_by(trainer.pid, place / "run"))

    def waits() -> bool:
        beat = read_beat(run().heartbeat)
        return beat is not None and beat.stage == "waiting"

    wait_until(waits, trainer)
    time.sleep(1.0)
    assert trainer.is_alive()
    assert checkpoints.steps(run().checkpoints) == []
    assert shutil.disk_usage(run().path).total == 400 * 1024
    enough.touch()
    assert code_of(trainer) == RunExit.FINISHED, (tmp_path / "log").read_text()[-3000:]
    there = RunFolder(kept)
    assert differences(whole.adapter, there.adapter) == []
    assert checkpoints.steps(there.checkpoints) == [4, 6]
    (told,) = (e.message for e in events_of(there, WarningEvent) if "cannot be saved" in e.message)
    # torch's writer does not say which error it met.
    assert "the checkpoint of step 2 cannot be saved: there is no room to write it" in told
    assert supervisor.status(kept).state == "finished"


def test_checkpoints_on_a_file_system_that_becomes_read_only_wait_too(
    tmp_path: Path, whole: RunFolder
) -> None:
    run, enough = make_run(tmp_path, **RUN), tmp_path / "enough"
    trainer = forks.start(train_beside_a_read_only_disk, run.path, enough, output=run.log("trainer"))
    wait_until(lambda: any(e.stage == "waiting" for e in events_of(run, StageEvent)), trainer)
    time.sleep(1.0)
    assert trainer.is_alive()
    (told,) = (e.message for e in events_of(run, WarningEvent) if "cannot be saved" in e.message)
    assert "the checkpoint of step 2 cannot be saved: Read-only file system" in told
    assert events_of(run, CheckpointEvent) == []
    enough.touch()
    assert code_of(trainer) == RunExit.FINISHED, run.log("trainer").read_text()[-3000:]
    assert [event.step for event in events_of(run, CheckpointEvent)] == [2, 4, 6]
    assert differences(whole.adapter, run.adapter) == []


def test_a_stop_on_a_read_only_file_system_ends_the_run_as_what_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, **RUN)
    trainer = forks.start(
        train_beside_a_read_only_disk, run.path, tmp_path / "never", output=run.log("trainer")
    )
    wait_until(lambda: any(e.stage == "waiting" for e in events_of(run, StageEvent)), trainer)
    supervisor.request_stop(run.path)
    assert code_of(trainer) == RunExit.DISK
    status = supervisor.status(run.path)
    assert (status.state, status.step) == ("disk", 2)
    assert "Read-only file system" in status.message
    assert "Traceback" not in run.log("trainer").read_text()


def begin_on(place: Path, how: str) -> int:
    """`vramwise train`, from where it has planned, with its run folders on such a file system."""
    mounts.mount_tmpfs(place, "64k")
    stand_ins.order_next(place)
    if how == "read-only":
        mounts.remount(place, read_only=True)
    elif how == "full":
        _fill(place / "ballast")
    else:
        # Room for the folder and its job, and for nothing that comes after.
        _fill(place / "ballast", left=2)
    return guarded("vramwise", lambda: stand_ins.train(place))


def _fill(ballast: Path, left: int = 0) -> None:
    """Write pages until there is no room, and take so many back."""
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
        file.truncate(file.tell() - 4096 * left)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("read-only", "Read-only file system"),
        ("full", "No space left on device"),
        ("nearly full", "No space left on device"),
    ],
)
def test_a_run_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path, how: str, said: str) -> None:
    place, log = tmp_path / "runs", tmp_path / "log"
    place.mkdir()
    begun = forks.start(begin_on, place, how, output=log)
    assert code_of(begun) == ExitCode.BAD_INPUT, log.read_text()[-3000:]
    (line,) = log.read_text().splitlines()
    assert str(place / "run") in line
    assert said in line
