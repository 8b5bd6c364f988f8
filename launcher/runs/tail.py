"""Read a growing file in bounded pieces, from either end. Light: no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 2**16
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

    def skip_to_last(self, size_bytes: int) -> None:
        """Begin with the last `size_bytes` of what is there, at the next whole line."""
        try:
            size = self.path.stat().st_size
        except OSError:
            return
        if size > size_bytes:
            self._offset, self._partial, self._skipping = size - size_bytes, b"", True

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


def lines_from_the_end(path: Path, *, down_to: int = 0) -> Iterator[bytes]:
    """Whole lines of a file, the last first, read in blocks; of an absent file none.

    What stands before the offset `down_to` is not read. A last line without its end is left out.
    """
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        start = file.seek(0, os.SEEK_END)
        rest, cut_off = b"", True
        while start > down_to:
            block = min(BLOCK_BYTES, start - down_to)
            start -= block
            file.seek(start)
            pieces = (file.read(block) + rest).split(b"\n")
            rest = pieces.pop(0) if start > down_to else b""
            if cut_off:
                if not pieces:
                    rest = b"" if len(rest) > MAX_LINE_BYTES else rest
                    continue
                pieces.pop()
                cut_off = False
            if len(rest) > MAX_LINE_BYTES:
                rest = b""
            yield from (line for line in reversed(pieces) if line.strip())


def last_line_with(path: Path, mark: bytes) -> bytes | None:
    """The last whole line that holds `mark`, which has no end of line in it; None if there is none."""
    try:
        file = path.open("rb")
    except OSError:
        return None
    with file:
        start = file.seek(0, os.SEEK_END)
        overlap = b""
        while start > 0:
            block = min(16 * BLOCK_BYTES, start)
            start -= block
            file.seek(start)
            content = file.read(block) + overlap
            found = content.rfind(mark)
            while found >= 0:
                line = _line_around(file, start + found)
                if line is not None:
                    return line
                found = content.rfind(mark, 0, found)
            overlap = content[: len(mark) - 1]
    return None


def _line_around(file: BinaryIO, position: int) -> bytes | None:
    """The whole line that the byte at `position` is in; None if it has no end or is too long."""
    begin = max(0, position - MAX_LINE_BYTES)
    file.seek(begin)
    before = file.read(position - begin)
    after = file.read(MAX_LINE_BYTES)
    end = after.find(b"\n")
    return None if end < 0 else before[before.rfind(b"\n") + 1 :] + after[:end]
