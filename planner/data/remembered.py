"""Lengths of a data file, estimated once and remembered until the file changes.

Reading 100,000 chats takes about a second, planning with their lengths a fraction of that. What is kept, in
the user's cache folder, are lengths and how often each occurs; no text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.base.data_files import user_cache_dir, write_atomically
from planner.base.errors import InputError
from planner.data.image_rule import ImageRule
from planner.data.lengths import DatasetStats

LEAST_BYTES = 2**22
"""A smaller file is read again faster than it is worth remembering."""
READER_VERSION = 3
"""To be raised when the same file would give other lengths."""


def estimated_lengths(path: Path, rule: ImageRule | None = None) -> DatasetStats:
    """Lengths of a data file or folder, estimated from the size of its texts, with the tokens that a model's
    `rule` makes of images, which are files of their own: of those nothing is remembered.

    It is taken to be unchanged while number, sizes and times of change to the nanosecond of its files are.

    Raises:
        InputError: it cannot be read or is not training data.
        MissingExtraError: a table whose package is not installed.
    """
    from planner.data.files import data_files
    from planner.data.reader import estimate_file

    if rule is not None:
        return estimate_file(path, rule)
    try:
        found = [each.stat() for each in data_files(path)]
    except OSError:
        return estimate_file(path)  # which says what is wrong
    size = sum(each.st_size for each in found)
    if size < LEAST_BYTES:
        return estimate_file(path)
    key = {
        "files": len(found),
        "size": size,
        "mtime_ns": sum(each.st_mtime_ns for each in found),
        "reader": READER_VERSION,
    }
    note = _note(path)
    known = _read(note, key)
    if known is None:
        known = estimate_file(path)
        _write(note, {**key, "stats": known.to_dict()})
    return known


def _note(path: Path) -> Path:
    from hashlib import sha256

    name = sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    return user_cache_dir() / "lengths" / f"{name}.json"


def _read(note: Path, key: dict[str, int]) -> DatasetStats | None:
    """What is remembered; None where that is nothing, of another state of the file, or damaged."""
    try:
        values = json.loads(note.read_text(encoding="utf-8"))
        if {name: values[name] for name in key} != key:
            return None
        return DatasetStats.from_dict(values["stats"])
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None


def _write(note: Path, values: dict[str, Any]) -> None:
    """Remember; a folder that cannot be written to only means that the file is read again next time."""
    try:
        write_atomically(note, json.dumps(values, separators=(",", ":")))
    except OSError:
        return
