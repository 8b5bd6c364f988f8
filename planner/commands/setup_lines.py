"""Lines of setups and their answers: read in pieces, which several processes may answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from planner.base.errors import InputError, VramwiseError
from planner.base.spread import spread, usable_processes
from planner.base.values import dataclass
from planner.planning.estimation import Estimate, Estimator
from planner.setup.training_setup import TrainingSetup

MAX_LINE_BYTES = 2**20
MAX_REPLAYED_LINES = 200
"""Lines that are replayed unless asked otherwise: some ten seconds."""
FITTED_LINES, REPLAYED_LINES = 200, 2
"""Lines of a piece, some 60 ms of work: by the fitted reserve, and with the allocator replayed."""
WORTH_SHARING = 4
"""Pieces from which on processes are started for them, which takes some 20 ms."""
ALONE_FIRST = 0.05
"""Share of the pieces that one process answers before others are started."""

T = TypeVar("T")
Answer = Estimate | VramwiseError


@dataclass(frozen=True, slots=True)
class Answering:
    """Who answers; the first `replayed` lines (null: all) with the allocator replayed."""

    estimator: Estimator
    replayed: int | None

    def answers(self, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Answer]]:
        """Yield the answer to each numbered line; empty lines have none."""
        for number, line in lines:
            if len(line) > MAX_LINE_BYTES or line.strip():
                yield number, self._answer(number, line)

    def _answer(self, number: int, line: bytes) -> Answer:
        if len(line) > MAX_LINE_BYTES:
            return InputError(f"a line of more than {MAX_LINE_BYTES:,} bytes is no training setup")
        replay = self.replayed is None or number <= self.replayed
        try:
            return self.estimator.estimate(TrainingSetup.from_dict(_parse(line)), replay=replay)
        except VramwiseError as error:
            return error


def numbered_lines(file: BinaryIO, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Lines of a file from where it stands, the first of them having that number; of one that is too long
    no more than shows it.
    """
    number = first
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            _skip_rest(file, line)
        yield number, line
        number += 1


class Piece(NamedTuple):
    """Some lines of a file: where they begin, the number of the first, and how many."""

    offset: int
    first: int
    lines: int


class SetupFile:
    """A file of setups that can be read from any place, in pieces."""

    def __init__(self, path: Path, answering: Answering, pieces: list[Piece]) -> None:
        self.path, self.answering, self.pieces = path, answering, pieces

    @classmethod
    def of(cls, path: Path, estimator: Estimator, *, replay: bool | None) -> SetupFile | None:
        """A file as it is; None where it cannot be read twice. Without a word on the `replay` the allocator
        is replayed for up to MAX_REPLAYED_LINES lines.

        Raises:
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            if not file.seekable():
                return None
            starts = list(_starts(file))
        if replay is None:
            replay = len(starts) <= MAX_REPLAYED_LINES
        each = REPLAYED_LINES if replay else FITTED_LINES
        pieces = [
            Piece(starts[at], at + 1, min(each, len(starts) - at)) for at in range(0, len(starts), each)
        ]
        return cls(path, Answering(estimator, None if replay else 0), pieces)

    def answered(self, told: Callable[[Iterator[tuple[int, Answer]]], T]) -> Iterator[T]:
        """What `told` makes of each piece's answers, in order.

        Raises:
            OSError: the file cannot be read any more.
        """

        def work(at: int) -> T:
            piece = self.pieces[at]
            with self.path.open("rb") as file:
                file.seek(piece.offset)
                lines = islice(numbered_lines(file, piece.first), piece.lines)
                return told(self.answering.answers(lines))

        count = len(self.pieces)
        processes = usable_processes() if count >= WORTH_SHARING else 1
        # What lines have in common (layers on tapes, models, coefficients) each process would work out anew.
        alone = int(count * ALONE_FIRST)
        yield from map(work, range(alone))
        with closing(spread(lambda at: work(alone + at), count - alone, processes)) as results:
            yield from results


def _starts(file: BinaryIO) -> Iterator[int]:
    """Where each line of a file begins."""
    offset = 0
    for _ in numbered_lines(file):
        yield offset
        offset = file.tell()


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"broken JSON at column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"JSON out of bounds: {error}") from error


def _skip_rest(file: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES)
