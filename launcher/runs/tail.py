"""Read a growing file in bounded pieces, from either end. Light: no torch."""

from __future__ import annotations

import os
import re
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

    Starts again from the beginning when the file is replaced or cut. `waiting_bytes` says how much more was
    there at the last look.
    """

    path: Path
    slice_bytes: int = 2**22
    waiting_bytes: int = field(default=0, init=False)
    restarted: bool = field(default=False, init=False)
    _offset: int = field(default=0, init=False)
    _inode: int = field(default=-1, init=False)
    _partial: bytes = field(default=b"", init=False)
    _skipping: bool = field(default=False, init=False)

    def read_new(self) -> list[bytes]:
        """New whole lines of at most one slice; an absent or unreadable file has none."""
        return _split(self.read_block())

    def read_block(self) -> bytes:
        """The same as they stand in the file, each with its end."""
        self.restarted = False
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                self._restart_if_replaced(found.st_ino, found.st_size)
                file.seek(self._offset)
                content = file.read(self.slice_bytes)
        except OSError:
            self.waiting_bytes = 0
            return b""
        self._offset += len(content)
        self.waiting_bytes = max(0, found.st_size - self._offset)
        return self._whole_lines(content)

    @property
    def behind(self) -> bool:
        """Whether more is waiting."""
        return self.waiting_bytes > 0

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

    def _whole_lines(self, content: bytes) -> bytes:
        block = self._partial + content if self._partial else content
        cut = block.rfind(b"\n") + 1
        self._partial, begin = block[cut:], 0
        if self._skipping and cut:
            begin, self._skipping = block.index(b"\n") + 1, False
        if len(self._partial) > MAX_LINE_BYTES:
            self._partial, self._skipping = b"", True
        return block[begin:cut]


def _split(block: bytes) -> list[bytes]:
    return [line for line in block.split(b"\n") if line and not line.isspace()]


LONG_BYTES = 2**24
"""What waits beyond this is thinned: 16 MiB are about 60,000 log events, half a second to read."""
KEPT_LINES = 2000
"""Lines of one kind that are kept, about, of what waits: some for each point of a curve of 1,024."""
WHOLE_BYTES = 2**17
"""At either end of what waits nothing is left out: about 500 events."""
SMALL_SLICE_BYTES = 2**18
"""Slices of a file that is thinned: lines in the processor's cache are gone through three times as fast."""


@dataclass(slots=True)
class ThinnedTail:
    """Whole lines of a growing file of events; of a long one that waits, those of one `kind` are thinned.

    Lines of other kinds, which are rare, all come, as do the first and the last ones. What is appended once
    all that waited has been read comes whole. `left_out` counts lines that have been.
    """

    path: Path
    kind: str
    tail: LineTail = field(init=False)
    left_out: int = field(default=0, init=False)
    _stride: int = field(default=0, init=False)
    _next: int = field(default=0, init=False)
    _slice_bytes: int = field(init=False)
    _mark: bytes = field(init=False)
    _of_kind: re.Pattern[bytes] = field(init=False)
    _others: re.Pattern[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.tail = LineTail(self.path)
        self._slice_bytes = self.tail.slice_bytes
        # As events.to_line begins a line; one that begins otherwise is taken for another kind, and read.
        begin = rf'\{{"time": [0-9.]+, "kind": "{re.escape(self.kind)}"'
        self._mark = f', "kind": "{self.kind}", '.encode()
        self._of_kind = re.compile(begin.encode())
        self._others = re.compile(rf"\n(?!{begin})".encode())

    @property
    def thinning(self) -> bool:
        """Whether lines are left out of what waits."""
        return self._stride > 0

    def read_new(self) -> list[bytes]:
        """What is kept of the new whole lines of one slice."""
        block = self.tail.read_block()
        if self.tail.restarted:
            self.left_out, self._stride, self._next = 0, 0, 0
        waiting, begin = self.tail.waiting_bytes, 0
        if not self._stride and waiting > LONG_BYTES and block:
            self._stride = max(1, waiting // KEPT_LINES)
            begin = block.find(b"\n", WHOLE_BYTES) + 1
        if not self._stride:
            return _split(block)
        end = max(begin, block.rfind(b"\n", 0, max(0, len(block) - max(0, WHOLE_BYTES - waiting))) + 1)
        kept = _split(block[:begin]) + self._thin(block[begin:end]) + _split(block[end:])
        if not waiting:
            self._stride = 0
        self.tail.slice_bytes = SMALL_SLICE_BYTES if waiting else self._slice_bytes
        return kept

    def _thin(self, block: bytes) -> list[bytes]:
        """A line every so many bytes, and all that are of another kind."""
        if not block:
            return []
        # Of millions of lines not even their splitting is cheap: they are counted, and gone through by an
        # expression, which takes twice as long, where there are others among them.
        lines, kept = block.count(b"\n"), set[int]()
        if block.count(self._mark) != lines:
            kept = {match.end() for match in self._others.finditer(block)}
            kept.discard(len(block))
            if not self._of_kind.match(block):
                kept.add(0)
        while self._next < len(block):
            kept.add(block.rfind(b"\n", 0, self._next) + 1)
            self._next += self._stride
        self._next -= len(block)
        self.left_out += lines - len(kept)
        found = (block[at : block.index(b"\n", at)] for at in sorted(kept))
        return [line for line in found if line and not line.isspace()]


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
