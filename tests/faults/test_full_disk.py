"""A disk that refuses: the trainer keeps what it has in memory, says so, and goes on when it can."""

from __future__ import annotations

import functools
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.runs import supervisor
from launcher.runs.ends import RunExit
from launcher.runs.events import CheckpointEvent, StageEvent, WarningEvent
from launcher.runs.folder import RunFolder
from launcher.runs.kept import checkpoints
from tests import forks
from tests.faults import broken_steps, small_runs
from tests.faults.small_runs import code_of, differences, events_of, make_run, start, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LARGEST_FILE_BYTES = 100_000
"""Less than an adapter and its optimizer's state; more than a run's events."""


def has_no_room() -> None:
    """Let the kernel refuse files beyond a size, as it refuses them on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, hard))
    tries_often()


def tries_often() -> None:
    from launcher.training.watching import patience

    patience.RETRY_SECONDS = 0.3


def replaced_by_a_file(folder: Path) -> None:
    def replace() -> None:
        folder.rmdir()
        folder.write_text("")

    tries_often()
    broken_steps.does_after(1, replace)


def wait_until(condition: Callable[[], object], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.1)


def waits(run: RunFolder) -> bool:
    return any(event.stage == "waiting" for event in events_of(run, StageEvent))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = make_run(tmp_path_factory.mktemp("whole"), examples=5, save_steps=2)
    assert trained(run) == RunExit.FINISHED
    return run


def test_a_full_disk_pauses_the_run_until_there_is_room(tmp_path: Path, whole: RunFolder) -> None:
    run = make_run(tmp_path, examples=5, save_steps=2)
    trainer = start(run, has_no_room)
    wait_until(lambda: waits(run))
    time.sleep(1.0)
    assert trainer.is_alive()
    assert trainer.pid is not None
    assert checkpoints.steps(run.checkpoints) == []
    assert events_of(run, CheckpointEvent) == []
    (told,) = (e.message for e in events_of(run, WarningEvent) if "cannot be saved" in e.message)
    assert "the checkpoint of step 2" in told
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, no_limit)
    assert code_of(trainer) == RunExit.FINISHED
    assert differences(whole.adapter, run.adapter) == []
    stages = [event.stage for event in events_of(run, StageEvent)]
    assert stages.count("waiting") == 1
    assert stages[stages.index("waiting") + 1] == "training"
    assert [event.step for event in events_of(run, CheckpointEvent)] == [2, 4, 6]
    assert not [path for path in run.checkpoints.iterdir() if path.name.startswith(".")]


def test_a_stop_while_waiting_for_room_ends_the_run_as_what_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, examples=5, save_steps=2)
    trainer = start(run, has_no_room)
    wait_until(lambda: waits(run))
    supervisor.request_stop(run.path)
    assert code_of(trainer) == RunExit.DISK
    status = supervisor.status(run.path)
    assert (status.state, status.step) == ("disk", 2)
    assert "step 2" in status.message
    assert "Traceback" not in run.log("trainer").read_text()


def test_the_adapter_waits_for_room_too(tmp_path: Path, whole: RunFolder) -> None:
    run = make_run(tmp_path, examples=5, checkpoints=False)
    trainer = start(run, has_no_room)
    wait_until(lambda: waits(run))
    assert not run.adapter.exists()
    assert trainer.pid is not None
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))
    assert code_of(trainer) == RunExit.FINISHED
    assert differences(whole.adapter, run.adapter) == []
    assert not run.partial_adapter.exists()


def test_a_checkpoints_folder_that_is_taken_away_is_waited_for(tmp_path: Path, whole: RunFolder) -> None:
    """A file stands where the folder was, as an unmounted disk leaves none."""
    run = make_run(tmp_path, examples=5, save_steps=2)
    trainer = start(run, functools.partial(replaced_by_a_file, run.checkpoints))
    wait_until(lambda: waits(run) or not trainer.is_alive())
    assert trainer.is_alive()
    run.checkpoints.unlink()
    assert code_of(trainer) == RunExit.FINISHED
    assert differences(whole.adapter, run.adapter) == []


def test_a_renamed_run_goes_on_in_its_new_place(tmp_path: Path, whole: RunFolder) -> None:
    run = make_run(tmp_path / "old", examples=5, save_steps=2)
    there = RunFolder(tmp_path / "new")
    move = functools.partial(broken_steps.does_after, 3, functools.partial(shutil.move, run.path, there.path))
    assert trained(run, move) == RunExit.FINISHED
    assert not run.path.exists()
    assert checkpoints.steps(there.checkpoints) == [4, 6]
    assert differences(whole.adapter, there.adapter) == []
    told = [event.path for event in events_of(there, CheckpointEvent)]
    assert told == [str(checkpoints.path_of(r.checkpoints, n)) for r, n in ((run, 2), (there, 4), (there, 6))]
    assert supervisor.status(there.path).state == "finished"


def test_a_run_whose_folder_is_gone_waits_and_ends_on_request(tmp_path: Path) -> None:
    run = make_run(tmp_path, examples=5, save_steps=2)
    log = tmp_path / "log"
    gone = functools.partial(broken_steps.does_after, 1, functools.partial(shutil.rmtree, run.path))
    trainer = forks.start(small_runs.train, run.path, gone, output=log)
    wait_until(lambda: not run.path.exists())
    time.sleep(1.0)
    trainer.terminate()
    assert code_of(trainer) == RunExit.DISK
    assert not run.path.exists()
