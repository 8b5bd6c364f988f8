"""A large data file is read once: its lengths are remembered until it changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from planner.base.errors import InputError
from planner.data import reader as dataset_reader
from planner.data import remembered as remembered_lengths
from planner.data.lengths import DatasetStats
from planner.data.remembered import estimated_lengths


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Files that were read, in a world whose cache is empty and where every file is large."""
    found: list[Path] = []
    estimate = dataset_reader.estimate_file

    def noted(path: Path) -> DatasetStats:
        found.append(path)
        return estimate(path)

    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "user-data"))
    monkeypatch.setattr(dataset_reader, "estimate_file", noted)
    monkeypatch.setattr(remembered_lengths, "LEAST_BYTES", 1)
    return found


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "data.jsonl", ["a secret", "b" * 400])
    first = estimated_lengths(path)
    assert estimated_lengths(path) == first
    assert reads == [path]
    notes = list((tmp_path / "user-data").rglob("*.json"))
    assert len(notes) == 1
    assert "secret" not in notes[0].read_text()
    write(path, ["a secret", "c" * 800])
    assert estimated_lengths(path).longest > first.longest
    os.utime(path, ns=(1, 1))
    estimated_lengths(path)
    assert len(reads) == 3


def test_a_damaged_note_is_written_anew(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "data.jsonl", ["text"])
    first = estimated_lengths(path)
    note = next((tmp_path / "user-data").rglob("*.json"))
    for damage in ("", "[]", "{}", note.read_text()[:-20]):
        note.write_text(damage)
        assert estimated_lengths(path) == first
    assert len(reads) == 5


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, reads: list[Path]) -> None:
    (tmp_path / "user-data").write_text("not a folder")
    path = write(tmp_path / "data.jsonl", ["text"])
    assert estimated_lengths(path).examples == 1
    assert estimated_lengths(path).examples == 1
    assert len(reads) == 2


def test_small_files_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "user-data"))
    estimated_lengths(write(tmp_path / "data.jsonl", ["text"]))
    assert not (tmp_path / "user-data").exists()


def test_an_absent_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        estimated_lengths(tmp_path / "absent.jsonl")


def test_reading_lengths_alone_gives_those_of_the_examples(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ["plain", "größer als gedacht", "x" * 1000])
    held = dataset_reader.estimate_stats(dataset_reader.read_training_data(path))
    assert dataset_reader.estimate_file(path) == held
