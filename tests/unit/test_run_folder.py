from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import supervisor
from launcher.runs.folder import RunBusyError, RunFolder, create_run_folder, hold_lock
from launcher.runs.training_job import TrainingJob
from planner.base.errors import InputError
from planner.setup.training_setup import TrainingSetup

SETUP = TrainingSetup(model="demo", max_length=64)


def make_job(**changes: Any) -> TrainingJob:
    return TrainingJob(**{"setup": SETUP, "model_source": "m", "data_path": "d.jsonl", **changes})


def test_a_job_survives_its_folder(tmp_path: Path) -> None:
    job = make_job(max_steps=5, eval_data_path="e.jsonl", eval_steps=2, save_steps=3)
    assert create_run_folder(tmp_path, job).read_job() == job


def test_folders_do_not_share_a_name(tmp_path: Path) -> None:
    paths = {create_run_folder(tmp_path, make_job()).path for _ in range(5)}
    assert len(paths) == 5
    create_run_folder(tmp_path, make_job(), name="mine")
    with pytest.raises(InputError, match="exists already"):
        create_run_folder(tmp_path, make_job(), name="mine")


def test_an_unprintable_model_is_refused_and_a_path_stays_inside(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        SETUP.replace(model="a\x1b[2J")
    folder = create_run_folder(tmp_path, make_job(setup=SETUP.replace(model="../..")))
    assert folder.path.parent == tmp_path.resolve()


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": -1},
        {"num_train_epochs": 0},
        {"max_steps": 0},
        {"max_steps": True},
        {"logging_steps": 0},
        {"warmup_ratio": 1.0},
        {"lr_scheduler_type": "step"},
        {"seed": -1},
        {"eval_steps": 5},
        {"data_path": ""},
        {"setup": None},
        {"gpu_index": -1},
        {"allow_download": "yes"},
    ],
)
def test_a_bad_job_is_refused_by_field(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes)).replace("_", "[-_]")):
        make_job(**changes)


@pytest.mark.parametrize(
    "change",
    [{"schema_version": 9}, {"rate": 1}, {"setup": {"model": "x"}}, {"setup": 3}, {"model_source": None}],
)
def test_a_bad_job_file_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = create_run_folder(tmp_path, make_job())
    folder.job.write_text(json.dumps({**make_job().to_dict(), **change}))
    with pytest.raises(InputError) as caught:
        folder.read_job()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"schema_version": 1}'])
def test_a_truncated_job_file_is_refused(tmp_path: Path, content: str) -> None:
    folder = create_run_folder(tmp_path, make_job())
    folder.job.write_text(content)
    with pytest.raises(InputError):
        folder.read_job()


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    folder = create_run_folder(tmp_path, make_job())
    code = (
        "import sys, time; from pathlib import Path; from launcher.runs.folder import *\n"
        f"with hold_lock(RunFolder(Path({str(folder.path)!r})), 'trainer'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "held"
    with pytest.raises(RunBusyError, match=str(holder.pid)), hold_lock(folder, "trainer"):
        pass
    holder.kill()
    holder.wait()
    with hold_lock(folder, "trainer"):
        pass


def test_a_folder_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        supervisor.status(tmp_path)
    with pytest.raises(InputError):
        supervisor.start(tmp_path)
    assert not RunFolder(tmp_path).events.exists()
