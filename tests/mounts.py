"""File systems of a process of its own: a tmpfs that is small, or becomes read-only. For forked processes.

What is mounted is seen by that process and its children alone, and gone with them. A test looks into it by
`seen_by`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
"""CLONE_NEWNS and CLONE_NEWUSER (linux/sched.h)."""
_READ_ONLY, _REMOUNT, _ALL_BELOW, _PRIVATE = 1, 32, 1 << 14, 1 << 18
"""MS_RDONLY, MS_REMOUNT, MS_REC and MS_PRIVATE (linux/mount.h)."""


def mount_tmpfs(place: Path, size: str) -> None:
    """Mount an empty tmpfs at a folder, for this process, which has no other thread, and its children.

    Raises:
        OSError: the kernel does not let this process.
    """
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, _ALL_BELOW | _PRIVATE, None)
    _call("mount", b"none", bytes(place), b"tmpfs", 0, f"size={size}".encode())


def remount(place: Path, *, read_only: bool = False, size: str | None = None) -> None:
    """Change what mount_tmpfs has mounted."""
    options = None if size is None else f"size={size}".encode()
    _call("mount", b"none", bytes(place), b"tmpfs", _REMOUNT | (_READ_ONLY if read_only else 0), options)


def remount_once(sign: Path, place: Path, size: str) -> None:
    """In a thread: let it be written to, and have that size, once the file `sign` is there."""

    def wait() -> None:
        while not sign.exists():
            time.sleep(0.05)
        remount(place, size=size)

    threading.Thread(target=wait, daemon=True).start()


def seen_by(pid: int, path: Path) -> Path:
    """A path as the process with that pid sees it, for as long as it lives."""
    return Path(f"/proc/{pid}/root", *path.parts[1:])


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@functools.cache
def _refusal() -> str:
    if sys.platform != "linux":
        return "no Linux"
    code = "from tests.mounts import mount_tmpfs; from pathlib import Path; mount_tmpfs(Path('/tmp'), '64k')"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def needs_mounts() -> None:
    """Skip a test where this user cannot mount a tmpfs, with the kernel's reason."""
    if reason := _refusal():
        pytest.skip(f"no tmpfs of its own to be had here: {reason}")
