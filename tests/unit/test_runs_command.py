"""`vramwise runs`: list, show, delete; names are names, and nothing on disk reaches a terminal raw."""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.commands import runs_folder
from launcher.runs.attempts import add_attempt, first_attempt
from launcher.runs.events import (
    CheckpointEvent,
    EndEvent,
    LogEvent,
    StartEvent,
    WarningEvent,
    append_event,
)
from launcher.runs.folder import RunFolder, check_name, create_run_folder, hold_lock
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import user_data_dir
from planner.base.errors import InputError
from planner.setup.training_setup import TrainingSetup

Cli = Callable[..., Any]
JOB = TrainingJob(
    setup=TrainingSetup(model="demo", max_length=64), model_source="m", data_path="/data/d.jsonl", max_steps=9
)
NASTY = "\x1b]52;c;aGk=\x07\x9b31m\u202e[link=x]\r\n\t"


def make_run(root: Path, name: str = "run") -> RunFolder:
    folder = create_run_folder(root, JOB, name=name)
    add_attempt(folder.attempts, first_attempt(JOB))
    append_event(folder.events, StartEvent(time=1.7e9, total_steps=9, environment={}))
    log = LogEvent(
        time=1.7e9 + 5,
        step=4,
        loss=1.25,
        learning_rate=None,
        grad_norm=None,
        tokens_per_second=100.0,
        step_seconds=2.0,
    )
    append_event(folder.events, log)
    return folder


def printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_list_tells_age_model_state_step_loss_and_reason(cli: Cli, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    append_event(folder.events, EndEvent(time=1.7e9 + 9, state="oom", message="out of memory", step=5))
    with hold_lock(make_run(tmp_path, "alive"), "trainer"):
        out = cli("runs", "--runs", tmp_path).out
        (alive, row) = json.loads(cli("runs", "list", "--json", "--runs", tmp_path).out)["runs"]
    lines = out.splitlines()
    assert lines[0].split() == ["run", "age", "model", "state", "step", "loss", "left"]
    assert lines[1].split()[-6:] == ["demo", "running", "4/9", "1.25", "0", "ms"]
    assert lines[2].split()[-5:] == ["demo", "oom", "5/9", "1.25", "-"]
    assert "unknown" not in out
    assert "out of memory" in out[out.index("Why") :]
    assert (row["state"], row["reason"], row["loss"], row["attempts"]) == ("oom", "out of memory", 1.25, 1)
    assert (alive["state"], alive["pid"], alive["alive"]) == ("running", os.getpid(), True)
    assert set(alive) >= {"seconds_left", "started", "changed", "model", "damaged", "keeper_pid"}


def test_one_damaged_run_spoils_nothing(cli: Cli, tmp_path: Path) -> None:
    make_run(tmp_path, "a-good-one")
    for name, file, content in (
        ("foreign", "job.json", b'{"name": "another tool"}'),
        ("cut", "job.json", b'{"schema_ver'),
        ("deep", "job.json", b"[" * 10**5),
        ("events", "events.jsonl", b'{"kind": "log"}\n\x00\xff\n{"kind": 3}\n'),
        ("plan", "plan.json", b"{"),
        ("attempts", "attempts.jsonl", b"[]\n"),
    ):
        folder = make_run(tmp_path, name)
        (folder.path / file).write_bytes(content)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "events.jsonl").write_text("")
    (tmp_path / "job.json").mkdir()
    (tmp_path / "train.jsonl").write_text("a file of records")
    done = cli("runs", "--runs", tmp_path)
    assert done.code == 0
    listed = json.loads(cli("runs", "--json", "--runs", tmp_path).out)["runs"]
    damaged = {row["run"]: row["damaged"] for row in listed}
    assert damaged == {
        "a-good-one": [],
        "foreign": ["job.json"],
        "cut": ["job.json"],
        "deep": ["job.json"],
        "events": [],
        "plan": ["plan.json"],
        "attempts": ["attempts.jsonl"],
        "gone": ["job.json"],
    }
    assert "damaged: job.json" in done.out
    for row in listed:
        assert cli("runs", "show", row["run"], "--runs", tmp_path).code == 0
        assert cli("runs", "follow", row["run"], "--runs", tmp_path).code in (1, 137), row


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "/abs",
        "a\\b",
        "a\x1b[2J",
        "a\u202eb",
        "a\nb",
        "-x",
        ".x",
        " x",
        "x" * 101,
    ],
)
def test_a_name_that_is_none_is_refused_before_anything_is_done(name: str, cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run name"):
        check_name(name)
    with pytest.raises(InputError, match="run name"):
        create_run_folder(tmp_path / "runs", JOB, name=name)
    with pytest.raises(argparse.ArgumentTypeError, match="run name"):
        runs_folder.run_name(name)
    done = cli("train", "--model", "m", "--data", "d", f"--name={name}", "--runs", tmp_path / "runs")
    assert done.code == 2
    assert "run name" in done.err
    assert printable(done.err)
    if not name.startswith("-"):
        for action in ("show", "follow", "stop", "delete"):
            done = cli("runs", action, name, "--runs", tmp_path / "runs")
            assert done.code == 2
            assert printable(done.err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["run", "qwen2.5-0.5b_лора 3", "日本語", "a.b", "x" * 100])
def test_a_name_that_is_one_is_kept(name: str, cli: Cli, tmp_path: Path) -> None:
    assert make_run(tmp_path, name).path.name == name
    assert cli("runs", "show", name, "--runs", tmp_path).code == 0


def test_a_name_that_is_taken_is_said_before_planning(cli: Cli, tmp_path: Path) -> None:
    with hold_lock(make_run(tmp_path), "trainer"):
        done = cli("train", "--model", "no-such-model", "--data", "d", "--name", "run", "--runs", tmp_path)
    assert done.code == 2
    assert f"exists already (running, process {os.getpid()})" in done.err


def test_nothing_foreign_reaches_the_terminal_raw(cli: Cli, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for event in (
        WarningEvent(time=1.7e9, message=f"warned {NASTY}"),
        CheckpointEvent(time=1.7e9, step=4, path=f"/c{NASTY}"),
        EndEvent(time=1.7e9 + 9, state=f"odd{NASTY}", message=f"said {NASTY}", step=5),
    ):
        append_event(folder.events, event)
    folder.log("trainer").write_text(f"a line {NASTY} of the log\n")
    job = json.loads(folder.job.read_text())
    folder.job.write_text(json.dumps({**job, "data_path": f"/d{NASTY}"}))
    nasty = tmp_path / f"n{NASTY}".replace("/", "")
    folder.path.rename(nasty)
    (tmp_path / "run").symlink_to(nasty)
    for words in (
        ("list",),
        ("show", "run"),
        ("follow", "run"),
        ("list", "--json"),
        ("show", "run", "--json"),
    ):
        done = cli("runs", *words, "--runs", tmp_path)
        assert (done.out + done.err).strip()
        assert printable(done.out), words
        assert printable(done.err), words


def test_show_tells_all_that_is_known(cli: Cli, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for step in (2, 10, 4):
        saved = folder.checkpoints / f"checkpoint-{step}"
        saved.mkdir(parents=True)
        (saved / "weights").write_bytes(b"x" * 3000)
        append_event(folder.events, CheckpointEvent(time=1.7e9, step=step, path=str(saved)))
    (folder.checkpoints / "checkpoint-x").mkdir()
    folder.log("trainer").write_text("".join(f"line {n}\n" for n in range(30)))
    out = cli("runs", "show", "run", "--runs", tmp_path).out
    for words in ("killed", "4/9", "1.25", "/data/d.jsonl", "step 4", "Attempts", "line 29"):
        assert words in out
    assert "line 3\n" not in out
    listed = out[out.index("Checkpoints") :]
    assert listed.index("checkpoint-2") < listed.index("checkpoint-4") < listed.index("checkpoint-10")
    facts = json.loads(cli("runs", "show", "run", "--json", "--runs", tmp_path).out)
    assert [one["step"] for one in facts["checkpoints"]] == [2, 4, 10]
    assert facts["checkpoints"][0]["bytes"] == 3000
    assert facts["attempt_list"][0]["reason"] == "start"
    assert facts["adapter"] is None


def test_runs_are_at_home_in_the_data_folder(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"no runs in {user_data_dir() / 'runs'}" in cli("runs").err
    make_run(user_data_dir() / "runs", "at-home")
    make_run(tmp_path / "runs", "elsewhere")
    assert "at-home" in cli("runs").out
    assert "elsewhere" not in cli("runs").out
    assert "elsewhere" in cli("runs", "--runs", "runs").out
    assert cli("runs", "delete", "at-home", "--yes").code == 0
    assert f"1 are in {tmp_path / 'runs'} (--runs runs)" in cli("runs").err


def test_delete_refuses_what_lives_and_asks(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path)
    for process in ("trainer", "keeper", "launcher"):
        with hold_lock(folder, process):
            done = cli("runs", "delete", "run", "--yes", "--runs", tmp_path)
            assert done.code == 2, process
            assert folder.job.is_file()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    done = cli("runs", "delete", "run", "--runs", tmp_path)
    assert done.code == 2
    assert "--yes" in done.err
    for answer, left in ((b"\n", True), (b"no\n", True), (b"y\n", False)):
        ours, theirs = pty.openpty()
        os.write(ours, answer)
        with os.fdopen(theirs, "r") as terminal:
            monkeypatch.setattr(sys, "stdin", terminal)
            done = cli("runs", "delete", "run", "--runs", tmp_path)
        os.close(ours)
        assert done.code == 0
        assert "for ever? [y/N]" in done.err
        assert folder.path.exists() is left
    assert list(tmp_path.iterdir()) == [tmp_path / "user-data"] or not list(tmp_path.glob(".del*"))
    done = cli("runs", "delete", "rnu", "--runs", tmp_path)
    assert done.code == 2


def test_a_stop_of_what_does_not_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert "not running (killed)" in cli("runs", "stop", "run", "--runs", tmp_path).err
    with hold_lock(folder, "trainer"):
        assert cli("runs", "stop", "run", "--runs", tmp_path).code == 0
    assert folder.stop.read_text() == ""
