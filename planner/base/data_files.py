"""Where shipped data and the user's own data live, and how their files are read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from planner.base.errors import InputError, shorten

T = TypeVar("T")
PROFILES = Path(__file__).resolve().parent.parent.parent / "profiles"


def user_data_dir() -> Path:
    """Folder of the user's own records, calibrations and inspected models (not created here).

    `VRAMWISE_DATA_DIR` overrides the platform's default.
    """
    override = os.environ.get("VRAMWISE_DATA_DIR")
    if override:
        return Path(override)
    import platformdirs

    return Path(platformdirs.user_data_dir("vramwise", appauthor=False))


def user_cache_dir() -> Path:
    """Folder of what can be worked out again (not created here); within `VRAMWISE_DATA_DIR` where set."""
    override = os.environ.get("VRAMWISE_DATA_DIR")
    if override:
        return Path(override) / "cache"
    import platformdirs

    return Path(platformdirs.user_cache_dir("vramwise", appauthor=False))


def read_json(path: Path, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a JSON file.

    Raises:
        InputError: the file cannot be read or holds something else; it is named.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"{path}: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write text so that a reader or a crash sees either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_all(folder: Path, texts: Mapping[str, str]) -> tuple[Path, ...]:
    """Write texts by their names into a folder, each file whole or not at all; the files that were written.

    Raises:
        InputError: one cannot be written.
    """
    found = []
    for name, text in texts.items():
        path = folder / name
        try:
            write_atomically(path, text)
        except OSError as error:
            raise InputError(f"{shorten(str(path))} cannot be written ({error.strerror})") from error
        found.append(path)
    return tuple(found)
