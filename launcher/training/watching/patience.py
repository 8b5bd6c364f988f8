"""Writing that outlives a full disk: what cannot be written is kept in memory and tried again.

Light: no torch.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from launcher.runs.events import Event, StageEvent, WarningEvent
from launcher.runs.kept.checkpoints import BrokenCheckpointError
from planner.base.errors import VramwiseError

T = TypeVar("T")
RETRY_SECONDS = 5.0
BEAT_SECONDS = 1.0
TRIES_AFTER_A_STOP = 3
"""Once somebody wants the run to end, room is not waited for longer than this many tries."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_WAY = (errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EIO)
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
"""How Rust's std::io::Error ends, which safetensors passes on as text."""
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "Parent directory", "cannot be opened")
"""What torch.save's own file writer says instead of an errno (caffe2/serialize/inline_container.cc,
torch/serialization.py)."""


class DiskError(VramwiseError):
    """There was no room, or no way, to write what must be kept, and somebody asked for an end."""


@dataclass(slots=True)
class PatientWriter:
    """Tries an action again for as long as the disk refuses it.

    `write` tells events, `beat` gives a sign of life by stage and step, `stop_requested` says whether
    somebody asked for an end.
    """

    write: Callable[[Event], None]
    beat: Callable[[str, int], None]
    stop_requested: Callable[[], bool]

    def insist(self, what: str, step: int, place: Path, action: Callable[[], T]) -> T:
        """What `action` returns, once it could be done; `what` names what it writes into the folder `place`.

        Raises:
            DiskError: it cannot be done, and somebody asked for an end.
        """
        tries, gone = 0, False
        while True:
            try:
                done = action()
            except (OSError, RuntimeError, SafetensorError, BrokenCheckpointError) as error:
                reason = refusal_of_the_disk(error, place)
                if reason is None and (gone or _errno(error) not in NO_WAY):
                    raise
                if reason is None:
                    # What was in the way for a moment, as a folder that somebody removes, is so once.
                    gone = True
                    continue
                tries += 1
                self._wait(what, step, reason, tries)
            else:
                if tries:
                    self._tell("training", f"{what} is saved after {tries} more tries")
                return done

    def _wait(self, what: str, step: int, reason: str, tries: int) -> None:
        if tries == 1:
            message = f"{what} cannot be saved: {reason}; it is kept in memory and tried again"
            self.write(WarningEvent(time=time.time(), message=message))
            self._tell("waiting", reason)
        until = time.monotonic() + RETRY_SECONDS
        while True:
            self.beat("waiting", step)
            if self.stop_requested() and tries >= TRIES_AFTER_A_STOP:
                raise DiskError(f"{what} could not be saved: {reason}")
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(BEAT_SECONDS, left))

    def _tell(self, stage: str, message: str) -> None:
        self.write(StageEvent(time=time.time(), stage=stage, message=message))


def refusal_of_the_disk(error: BaseException, place: Path) -> str | None:
    """Why the disk refuses to be written, in words; None where the error says something else.

    A missing file or a lack of rights may come from a bug as well: only if a file cannot be made in `place`
    either is it the disk's.
    """
    if isinstance(error, BrokenCheckpointError):
        return str(error)
    number = _errno(error)
    if number in NO_ROOM:
        return os.strerror(number)
    if number in NO_WAY:
        return _refused(place)
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_WRITER):
        return _refused(place) or "there is no room to write it"
    return None


def _errno(error: BaseException) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = _RUST_ERRNO.search(str(error))
    return int(found[1]) if found else 0


def _refused(place: Path) -> str | None:
    """Why no file can be made in a folder, or in that where it would be; None if one can."""
    probe = (place if place.exists() else place.parent) / f".probe.{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
