"""Read a growing file in bounded pieces."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

# A longer line is no event of ours; it is dropped, so that a broken file cannot fill the memory.
MAX_LINE_BYTES = 2**20


@dataclass(slots=True)
class LineTail:
    """Whole lines of a file as they are appended; a partial last line waits for its end.

    Starts again from the beginning when the file is replaced or cut. `behind` says that more is waiting.
    """

    path: Path
    slice_bytes: int = 2**22
    behind: bool = field(default=False, init=False)
    restarted: bool = field(default=False, init=False)
    _offset: int = field(default=0, init=False)
    _inode: int = field(default=-1, init=False)
    _partial: bytes = field(default=b"", init=False)
    _skipping: bool = field(default=False, init=False)

    def read_new(self) -> list[bytes]:
        """New whole lines of at most one slice; an absent or unreadable file has none."""
        self.restarted = False
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                self._restart_if_replaced(found.st_ino, found.st_size)
                file.seek(self._offset)
                content = file.read(self.slice_bytes)
        except OSError:
            self.behind = False
            return []
        self._offset += len(content)
        self.behind = self._offset < found.st_size
        return self._lines(content)

    def _restart_if_replaced(self, inode: int, size: int) -> None:
        if self._inode not in (-1, inode) or size < self._offset:
            self._offset, self._partial, self._skipping, self.restarted = 0, b"", False, True
        self._inode = inode

    def _lines(self, content: bytes) -> list[bytes]:
        lines = (self._partial + content).split(b"\n")
        self._partial = lines.pop()
        if self._skipping and lines:
            del lines[0]
            self._skipping = False
        if len(self._partial) > MAX_LINE_BYTES:
            self._partial, self._skipping = b"", True
        return [line for line in lines if line.strip()]


def last_lines(path: Path, count: int, *, limit_bytes: int = 2**15) -> tuple[str, ...]:
    """The last lines of a log; of a line that a progress bar rewrote, what it came to."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit_bytes))
            content = file.read(limit_bytes).decode("utf-8", "replace")
    except OSError:
        return ()
    lines = content.split("\n")
    if size > limit_bytes:
        del lines[0]
    shown = (line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in lines)
    return tuple(line for line in shown if line)[-count:]
