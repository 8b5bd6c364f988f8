from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher.runs.events import (
    EndEvent,
    Event,
    EventReader,
    EventWriter,
    LogEvent,
    MemoryEvent,
    SampleEvent,
    StartEvent,
    WarningEvent,
    follow,
    from_line,
    read_events,
    to_line,
)

EVENTS: list[Event] = [
    StartEvent(time=1.0, total_steps=3, environment={"torch": "2.13", "cuda": None}),
    LogEvent(
        time=2.0,
        step=1,
        loss=1.5,
        learning_rate=1e-4,
        grad_norm=0.5,
        tokens_per_second=10.0,
        step_seconds=0.1,
    ),
    MemoryEvent(time=2.5, phase="step", step=1, allocated_bytes=1, reserved_bytes=2, process_bytes=None),
    WarningEvent(time=3.0, message="\x1b]52;[red]\n"),
    SampleEvent(time=3.5, used_bytes=1, total_bytes=2, process_bytes=None),
    EndEvent(time=4.0, state="finished", message="", step=3),
]


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_survives_its_line(event: Event) -> None:
    line = to_line(event)
    assert line.count("\n") == 1
    assert {"time", "kind"} <= json.loads(line).keys()
    assert from_line(line) == event


def test_a_loss_that_is_no_number_is_written_as_null() -> None:
    line = to_line(
        LogEvent(
            time=0.0,
            step=1,
            loss=float("nan"),
            learning_rate=None,
            grad_norm=float("inf"),
            tokens_per_second=None,
            step_seconds=None,
        )
    )
    assert "NaN" not in line
    assert "Infinity" not in line
    event = from_line(line)
    assert isinstance(event, LogEvent)
    assert event.loss is None


@pytest.mark.parametrize("line", [b"", b"\xff", b"{}", b"[]", b"3", b'{"kind": "log"}', b'{"kind": "new"}'])
def test_a_line_that_is_no_event_becomes_a_warning(line: bytes) -> None:
    assert isinstance(from_line(line), WarningEvent)


def test_a_key_from_a_later_version_is_left_out() -> None:
    line = '{"time": 1.0, "kind": "warning", "message": "m", "severity": 3}'
    assert from_line(line) == WarningEvent(time=1.0, message="m")


def test_a_reader_sees_whole_events_at_every_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    content = "".join(map(to_line, EVENTS)).encode()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        reader = EventReader(path)
        first = reader.read_new()
        assert first == EVENTS[: content[:cut].count(b"\n")]
        with path.open("ab") as file:
            file.write(content[cut:])
        assert first + reader.read_new() == EVENTS


def test_an_absent_file_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []


def test_a_torn_line_does_not_swallow_the_next_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(to_line(EVENTS[0]).encode() + b'{"time": 1.0, "ki')
    with EventWriter(path) as writer:
        writer.write(EVENTS[1])
    events = read_events(path)
    assert events[0] == EVENTS[0]
    assert isinstance(events[1], WarningEvent)
    assert events[2] == EVENTS[1]


def test_a_full_disk_loses_events_and_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    real_write = os.write
    with EventWriter(path) as writer:
        writer.write(EVENTS[0])

        def full(descriptor: int, content: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        writer.write(EVENTS[1])
        writer.write(EVENTS[2])
        monkeypatch.setattr(os, "write", real_write)
        writer.write(EVENTS[-1])
    first, lost, last = read_events(path)
    assert (first, last) == (EVENTS[0], EVENTS[-1])
    assert isinstance(lost, WarningEvent)
    assert lost.message.startswith("2 events")


def test_follow_ends_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def write() -> None:
        with EventWriter(path) as writer:
            for event in EVENTS:
                writer.write(event)

    thread = threading.Timer(0.3, write)
    thread.start()
    assert list(follow(path)) == EVENTS
    thread.join()


def test_follow_ends_when_the_trainer_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(to_line(EVENTS[0]))
    assert list(follow(path, until=lambda: True)) == [EVENTS[0]]


def test_watchers_import_no_training_stack() -> None:
    code = (
        "import sys, launcher.runs.events, launcher.runs.folder, launcher.runs.supervisor;"
        "print([m for m in ('torch', 'transformers', 'trl', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
