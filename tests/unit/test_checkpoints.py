"""Checkpoints on disk: whole or not there, whatever happened to their files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.runs.kept import checkpoints
from launcher.runs.kept.checkpoints import MANIFEST, BrokenCheckpointError
from planner.base.errors import InputError

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def make(root: Path, step: int) -> Path:
    staged = checkpoints.stage(root, step)
    for number, name in enumerate(FILES):
        (staged / name).write_bytes(bytes([step % 256, number]) * 5000)
    return checkpoints.publish(staged, root).path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (3, 6, 9):
        make(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit is flipped": flip,
    "the end is cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "it is empty": lambda path: os.truncate(path, 0),
    "it is gone": Path.unlink,
    "it is a link": lambda path: path.rename(path.with_name("x")).with_name(path.name).symlink_to("x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    root: Path, name: str, damage: str
) -> None:
    DAMAGE[damage](root / "checkpoint-9" / name)
    found = checkpoints.newest(root)
    assert found.newest is not None
    assert found.newest.step == 6
    (reason,) = found.broken
    assert str(root / "checkpoint-9" / name) in reason


def test_a_file_that_is_not_the_checkpoints_is_named(root: Path) -> None:
    (root / "checkpoint-9" / "payload.pkl").write_bytes(b"x")
    with pytest.raises(BrokenCheckpointError, match=r"payload\.pkl"):
        checkpoints.verify(root / "checkpoint-9")


def test_a_checkpoint_under_the_name_of_another_step_is_none(root: Path) -> None:
    (root / "checkpoint-9").rename(root / "checkpoint-12")
    with pytest.raises(BrokenCheckpointError, match=MANIFEST):
        checkpoints.verify(root / "checkpoint-12")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 1, "step": 9}',
        '{"version": 1, "step": 9, "files": {}}',
        "[" * 5000,
    ],
)
def test_a_manifest_that_is_none_is_refused(root: Path, content: str) -> None:
    (root / "checkpoint-9" / MANIFEST).write_text(content)
    with pytest.raises(BrokenCheckpointError, match=MANIFEST):
        checkpoints.verify(root / "checkpoint-9")


def test_every_prefix_of_a_save_leaves_the_checkpoint_before(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at each call that changes the disk, in the order in which they are made."""

    class KilledError(BaseException):
        pass

    def count(patch: pytest.MonkeyPatch, left: list[int]) -> None:
        for owner, name in (
            (os, "fsync"),
            (Path, "rename"),
            (Path, "chmod"),
            (Path, "mkdir"),
            (Path, "open"),
        ):
            real = getattr(owner, name)

            def call(*args: object, _real: Callable[..., object] = real, **kwargs: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    raise KilledError
                return _real(*args, **kwargs)

            patch.setattr(owner, name, call)

    survived, seen = 0, set()
    for calls in range(200):
        copy = root.parent / f"copy-{calls}"
        shutil.copytree(root, copy)
        with monkeypatch.context() as patch:
            left = [calls]
            count(patch, left)
            try:
                make(copy, 12)
            except KilledError:
                survived += 1
        found = checkpoints.newest(copy)
        assert found.newest is not None
        assert found.broken == ()
        seen.add(found.newest.step)
        checkpoints.clear_partial(copy)
        assert not [path for path in copy.iterdir() if path.name.startswith(".")]
        shutil.rmtree(copy)
        if left[0] >= 0:
            break
    assert seen == {9, 12}
    assert survived > len(FILES)


def test_saved_is_said_only_after_files_folders_and_the_rename_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        real_sync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        done.append(f"rename {target.name}")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    make(tmp_path / "checkpoints", 3)
    place = done.index("rename checkpoint-3")
    assert {f"sync {name}" for name in (*FILES, MANIFEST, "checkpoint-3")} <= set(done[:place])
    assert done[place + 1 :] == ["sync checkpoints"]
    # The folder of all checkpoints, new here, is synced into the run's.
    assert done[0] == f"sync {tmp_path.name}"


def test_what_a_cut_off_save_left_is_no_checkpoint_and_is_removed(root: Path) -> None:
    staged = checkpoints.stage(root, 12)
    (staged / "optimizer.pt").write_bytes(b"half")
    assert checkpoints.steps(root) == [3, 6, 9]
    checkpoints.clear_partial(root)
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]


@pytest.mark.parametrize("keep", [2, 3])
def test_rotation_keeps_the_newest_whole_ones_by_step(root: Path, keep: int) -> None:
    make(root, 12)
    # The clock went back: the newest steps have the oldest times, and a broken one the newest.
    for age, step in enumerate((12, 9, 6, 3)):
        os.utime(root / f"checkpoint-{step}", (1000 + age, 1000 + age))
    removed = checkpoints.rotate(root, keep=keep)
    assert checkpoints.steps(root) == [6, 9, 12][-keep:]
    assert removed == [6, 3][2 - (4 - keep) :]


def test_rotation_removes_nothing_before_enough_whole_ones_are_newer(root: Path) -> None:
    make(root, 12)
    flip(root / "checkpoint-12" / "optimizer.pt")
    os.utime(root / "checkpoint-12", (2e9, 2e9))
    checkpoints.rotate(root)
    assert checkpoints.steps(root) == [6, 9, 12]
    (root / "checkpoint-9" / MANIFEST).unlink()
    checkpoints.rotate(root)
    assert checkpoints.steps(root) == [6, 9, 12]


@pytest.mark.parametrize(
    ("best", "left", "removed"), [(3, [3, 9, 12], [6]), (9, [9, 12], [6, 3]), (12, [9, 12], [6, 3])]
)
def test_the_best_one_is_kept_beside_the_newest(
    root: Path, best: int, left: list[int], removed: list[int]
) -> None:
    make(root, 12)
    assert checkpoints.rotate(root, keep=2, verified={3, 6, 9, 12}, protected={best}) == removed
    assert checkpoints.steps(root) == left


def test_the_best_one_counts_for_no_newer_one_and_stays_though_it_is_broken(root: Path) -> None:
    make(root, 12)
    flip(root / "checkpoint-12" / "optimizer.pt")
    flip(root / "checkpoint-3" / "optimizer.pt")
    assert checkpoints.rotate(root, keep=2, protected={3}) == []
    make(root, 15)
    assert checkpoints.rotate(root, keep=2, protected={3}) == [6]
    assert checkpoints.steps(root) == [3, 9, 12, 15]


def test_a_verified_one_that_lost_a_file_since_is_not_counted(root: Path) -> None:
    (root / "checkpoint-9" / "optimizer.pt").unlink()
    checkpoints.rotate(root, verified={3, 6, 9})
    assert checkpoints.steps(root) == [3, 6, 9]


def test_a_broken_one_is_replaced_when_its_step_is_done_again(root: Path) -> None:
    flip(root / "checkpoint-9" / "optimizer.pt")
    make(root, 9)
    assert checkpoints.newest(root).broken == ()


@pytest.mark.parametrize(("mode", "files"), [(0o700, 0o600), (0o755, 0o644), (0o770, 0o660)])
def test_files_get_the_modes_that_the_umask_gave_their_folder(tmp_path: Path, mode: int, files: int) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    root.chmod(mode)
    path = make(root, 3)
    assert path.stat().st_mode & 0o777 == mode
    assert {one.stat().st_mode & 0o777 for one in path.iterdir()} == {files}


def test_a_disk_without_room_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoints.refuse_full_disk(tmp_path / "not" / "yet", 1, "two checkpoints")
    with pytest.raises(InputError, match=r"two checkpoints need .* MiB of disk, .* are free") as caught:
        checkpoints.refuse_full_disk(tmp_path / "not" / "yet", 2**60, "two checkpoints")
    assert "\n" not in str(caught.value)


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    found = checkpoints.newest(tmp_path / "absent")
    assert (found.newest, found.broken) == (None, ())
    assert json.loads((make(tmp_path, 1) / MANIFEST).read_text())["step"] == 1
