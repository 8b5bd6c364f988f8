"""Work shared out among processes: pieces that do not need each other, or one beside another."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, cast

from planner.base.errors import VramwiseError

T = TypeVar("T")
_NUMBER_BYTES = 8
_READ_BYTES = 2**20
_AHEAD = 2
"""Pieces that a process has been given at a time, so that it need not wait for the next one."""


def usable_processes() -> int:
    """How many processes may share work: as many as this one may have cores; one where a process cannot be
    forked without care, which is elsewhere than on Linux, and beside other threads.
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        return 1
    return len(os.sched_getaffinity(0))


def spread(work: Callable[[int], T], pieces: int, processes: int) -> Generator[T]:
    """The results of `work` for 0, 1 ... `pieces` - 1 in this order, worked out by so many forked processes,
    or by this one where one is enough. A process that is through with a piece gets the next one.

    Close the iterator where it is not read to its end: the processes end with it. They end by themselves
    where this one is killed.

    Raises:
        VramwiseError: what a piece raised, in its turn; or a process ended before its work was done.
    """
    processes = min(processes, pieces)
    if processes <= 1:
        yield from map(work, range(pieces))
        return
    _flush()
    workers: list[_Worker] = []
    try:
        for _ in range(processes):
            workers.append(_Worker(work, workers))
        yield from _in_order(workers, pieces)
    finally:
        for worker in workers:
            worker.end()


@contextmanager
def beside(work: Callable[[], T], processes: int) -> Iterator[Callable[[], T]]:
    """What gives the result of `work`, which another process begins with at once; with no more than one of
    `processes` this one works it out when it is asked for.

    Raises:
        VramwiseError: when it is asked for: what the work raised, or the process ended before it was done.
    """
    if processes <= 1:
        yield work
        return
    _flush()
    worker = _Worker(lambda _: work(), [])

    def result() -> T:
        _, failed, found = worker.take()
        if failed:
            raise found
        return cast("T", found)

    try:
        worker.give(0)
        yield result
    finally:
        worker.end()


def _flush() -> None:
    """Write what is to be written, which each process would write once more."""
    sys.stdout.flush()
    sys.stderr.flush()


def _in_order(workers: list[_Worker], pieces: int) -> Iterator[Any]:
    by_results = {worker.results: worker for worker in workers}
    poll = select.poll()
    following = 0
    for worker in workers:
        poll.register(worker.results, select.POLLIN)
    for worker in workers * _AHEAD:
        if following < pieces:
            worker.give(following)
            following += 1
    done: dict[int, Any] = {}
    for piece in range(pieces):
        while piece not in done:
            for descriptor, _ in poll.poll():
                worker = by_results[descriptor]
                which, failed, result = worker.take()
                done[which] = failed, result
                if following < pieces:
                    worker.give(following)
                    following += 1
        failed, result = done.pop(piece)
        if failed:
            raise result
        yield result


class _Worker:
    """A forked process that works on the pieces it is given, and this one's ends of its two pipes."""

    def __init__(self, work: Callable[[int], object], others: list[_Worker]) -> None:
        given, self.tasks = os.pipe()
        self.results, told = os.pipe()
        self._alive = True
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in (self.tasks, self.results):
                os.close(descriptor)
            # Held open here, the others' pipes would not tell them that their reader is gone.
            for other in others:
                other.close()
            _serve(work, given, told)
        os.close(given)
        os.close(told)

    def give(self, piece: int) -> None:
        """Hand over a piece."""
        try:
            os.write(self.tasks, piece.to_bytes(_NUMBER_BYTES))
        except BrokenPipeError as error:
            raise self._ended() from error

    def take(self) -> tuple[int, bool, Any]:
        """A result: of which piece, whether that raised it, and itself."""
        length = int.from_bytes(self._read(_NUMBER_BYTES))
        found: tuple[int, bool, Any] = pickle.loads(self._read(length))  # noqa: S301 - of our own process
        return found

    def close(self) -> None:
        """Close this end of the pipes, upon which the process ends."""
        os.close(self.tasks)
        os.close(self.results)

    def end(self) -> None:
        """End the process and wait for it."""
        self.close()
        if self._alive:
            os.kill(self.pid, signal.SIGTERM)
            os.waitpid(self.pid, 0)

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = os.read(self.results, min(_READ_BYTES, count - len(parts)))
            if not part:
                raise self._ended()
            parts += part
        return bytes(parts)

    def _ended(self) -> VramwiseError:
        self._alive = False
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return VramwiseError(f"a process that shared the work {how}")


def _serve(work: Callable[[int], object], given: int, told: int) -> NoReturn:
    """Work on pieces until there are no more, or nobody who wants them; ends the process."""
    # Ctrl-C goes to every process of the terminal: this one has nothing to say of it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        while number := os.read(given, _NUMBER_BYTES):
            piece = int.from_bytes(number)
            try:
                answer = piece, False, work(piece)
            except VramwiseError as error:
                answer = piece, True, error
            frame = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
            frame = len(frame).to_bytes(_NUMBER_BYTES) + frame
            while frame:
                frame = frame[os.write(told, frame) :]
        code = 0
    except BrokenPipeError:
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        # Neither what the other process has yet to write, nor what it does at its end, is for this one.
        os._exit(code)
