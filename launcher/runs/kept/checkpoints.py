"""Checkpoints on disk: written whole or not at all, verified by hashes, rotated by step. Light: no torch.

A checkpoint is made in a hidden folder beside the others. A manifest with the hash of each file is written
last, everything is synced, and a rename makes it `checkpoint-N`; so what has that name was whole when it got
it. A folder is a checkpoint only if its manifest says so: its name and its times say nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.base.errors import InputError, VramwiseError
from planner.setup.defaults import KEPT_CHECKPOINTS

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
MOST_MANIFEST_BYTES = 1_000_000
_NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,9})")
_STAGING, _REMOVED = ".saving", ".removed"


class BrokenCheckpointError(VramwiseError):
    """A folder is no whole checkpoint; the message names the file that says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A verified checkpoint: the optimizer steps it holds, where, and the bytes of its files."""

    step: int
    path: Path
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The newest verified checkpoint, and of each newer folder that is none, why."""

    newest: Checkpoint | None
    broken: tuple[str, ...]


def path_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is; transformers' own name for it."""
    return root / f"checkpoint-{step}"


def stage(root: Path, step: int) -> Path:
    """An empty hidden folder to write the files of a checkpoint into, on the file system where it will be.

    Raises:
        OSError: it cannot be made.
    """
    if not root.exists():
        root.mkdir()
        _sync(root.parent)
    clear_partial(root)
    staged = root / _STAGING / path_of(root, step).name
    staged.mkdir(parents=True)
    return staged


def publish(staged: Path, root: Path) -> Checkpoint:
    """Make a staged folder the checkpoint of its name, and read it back.

    Raises:
        OSError: it cannot be written.
        BrokenCheckpointError: what was read back is not what was written.
    """
    step = _step_of(staged)
    hashes = {name: _file_entry(staged / name) for name in sorted(_files(staged))}
    values = {"version": MANIFEST_VERSION, "step": step, "files": hashes}
    _write(staged / MANIFEST, {**values, "sha256": _digest(values)})
    place(staged, path_of(root, step))
    shutil.rmtree(root / _STAGING, ignore_errors=True)
    return verify(path_of(root, step))


def place(partial: Path, target: Path) -> None:
    """Make a written folder appear at `target`, in place of what is there: modes, sync, rename, sync.

    Raises:
        OSError: it cannot be done; the new folder is still in `partial`.
    """
    _take_modes(partial, target.parent)
    _sync_tree(partial)
    if target.exists():
        _hide(target)
    partial.rename(target)
    _sync(target.parent)
    shutil.rmtree(target.parent / _REMOVED, ignore_errors=True)


def verify(path: Path) -> Checkpoint:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises:
        BrokenCheckpointError: a file is missing, changed, cut, or not of the checkpoint.
    """
    expected = _read_manifest(path)
    try:
        names = set(_files(path)) - {MANIFEST}
        for name in sorted(names - expected.keys()):
            raise BrokenCheckpointError(f"{path / name}: not a file of this checkpoint")
        for name, entry in sorted(expected.items()):
            if name not in names:
                raise BrokenCheckpointError(f"{path / name}: missing")
            _compare(path / name, entry)
        size = sum((path / name).stat().st_size for name in (*names, MANIFEST))
    except OSError as error:
        raise BrokenCheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from error
    return Checkpoint(step=_step_of(path), path=path, size_bytes=size)


def steps(root: Path) -> list[int]:
    """Steps of all folders that are named as checkpoints, whole or not, in ascending order."""
    try:
        found = [_NAME.fullmatch(path.name) for path in root.iterdir()]
    except OSError:
        return []
    return sorted(int(name[1]) for name in found if name is not None)


def newest(root: Path) -> Found:
    """The verified checkpoint of the highest step; what is broken above it is named."""
    broken: list[str] = []
    for step in reversed(steps(root)):
        try:
            return Found(newest=verify(path_of(root, step)), broken=tuple(broken))
        except BrokenCheckpointError as error:
            broken.append(str(error))
    return Found(newest=None, broken=tuple(broken))


def rotate(
    root: Path,
    *,
    keep: int = KEPT_CHECKPOINTS,
    verified: Iterable[int] = (),
    protected: Iterable[int] = (),
) -> list[int]:
    """Remove what is older than the newest `keep` verified checkpoints, but for the `protected` steps;
    returns the steps removed.

    Nothing is removed before that many have been read and found whole; `verified` are steps that this
    process has read before, which are only looked at again for their sizes. File times decide nothing.
    """
    known, spared, kept, removed = set(verified), set(protected), 0, []
    for step in reversed(steps(root)):
        path = path_of(root, step)
        if kept >= keep:
            if step not in spared:
                _discard(path)
                removed.append(step)
        elif (_has_its_sizes if step in known else _is_whole)(path):
            kept += 1
    return removed


def clear_partial(root: Path) -> None:
    """Remove what a save or a removal that was cut off has left."""
    for name in (_STAGING, _REMOVED):
        shutil.rmtree(root / name, ignore_errors=True)


def refuse_full_disk(folder: Path, need_bytes: int, what: str) -> None:
    """See that a run's files will have room, in the folder or where it will be made.

    Raises:
        InputError: they will not; the message says what is needed, what is free and where.
    """
    place_of = folder.absolute()
    while not place_of.exists():
        place_of = place_of.parent
    free = shutil.disk_usage(place_of).free
    if free < need_bytes:
        raise InputError(
            f"{folder}: {what} need {need_bytes / 2**20:,.0f} MiB of disk, {free / 2**20:,.0f} MiB are free"
        )


def _step_of(path: Path) -> int:
    name = _NAME.fullmatch(path.name)
    if name is None:
        raise BrokenCheckpointError(f"{path}: not named as a checkpoint")
    return int(name[1])


def _files(folder: Path) -> Iterator[str]:
    """Names of all files below a folder, relative to it.

    Raises:
        BrokenCheckpointError: something there is neither file nor folder.
    """
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            yield path.relative_to(folder).as_posix()
        elif not stat.S_ISDIR(mode):
            raise BrokenCheckpointError(f"{path}: not a file of this checkpoint")


def _file_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "bytes": os.fstat(file.fileno()).st_size}


def _read_manifest(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The manifest's files.

    Raises:
        BrokenCheckpointError: there is none, it is not one, or it is another step's.
    """
    file = path / MANIFEST
    try:
        with file.open("rb") as opened:
            values = json.loads(opened.read(MOST_MANIFEST_BYTES))
        entries = {
            str(name): {"sha256": str(e["sha256"]), "bytes": int(e["bytes"])}
            for name, e in values["files"].items()
        }
        whole = values.pop("sha256") == _digest(values)
        known = whole and values["version"] == MANIFEST_VERSION and values["step"] == _step_of(path)
    except FileNotFoundError as error:
        raise BrokenCheckpointError(f"{file}: missing, so the checkpoint is not whole") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{file}: not a readable manifest") from error
    if not known or not entries:
        raise BrokenCheckpointError(f"{file}: not the manifest of this checkpoint")
    return entries


def _compare(path: Path, entry: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise BrokenCheckpointError(f"{path}: {size:,} bytes where {entry['bytes']:,} were written")
    with path.open("rb") as file:
        # From the disk, where it can be asked for, rather than from what the kernel still holds of the write.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise BrokenCheckpointError(f"{path}: its content is not what was written")


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except BrokenCheckpointError:
        return False
    return True


def _has_its_sizes(path: Path) -> bool:
    try:
        return all(
            (path / name).stat().st_size == entry["bytes"] for name, entry in _read_manifest(path).items()
        )
    except (OSError, BrokenCheckpointError):
        return False


def _discard(path: Path) -> None:
    """Remove a folder; cut off, it is not there under its name."""
    shutil.rmtree(_hide(path), ignore_errors=True)


def _hide(path: Path) -> Path:
    hidden = path.parent / _REMOVED
    shutil.rmtree(hidden, ignore_errors=True)
    return path.rename(hidden)


def _take_modes(folder: Path, like: Path) -> None:
    """Give a folder's files the modes that the umask gave the folder they go to, whatever made them."""
    allowed = stat.S_IMODE(like.stat().st_mode) & 0o777
    folder.chmod(allowed)
    for path in folder.rglob("*"):
        path.chmod(allowed if path.is_dir() else allowed & 0o666)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()


def _write(path: Path, values: object) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
