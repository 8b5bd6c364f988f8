"""Work shared out among forked processes: what it answers, and how it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import islice
from typing import NoReturn

import pytest

from planner.base.errors import FieldError, VramwiseError
from planner.base.spread import beside, spread, usable_processes


def gone(pid: int) -> bool:
    """Whether a process that may have another parent ends within some seconds."""
    for _ in range(1000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_results_come_in_order_from_several_processes() -> None:
    def slow_at_first(piece: int) -> tuple[int, int, bytes]:
        time.sleep(0.05 if piece == 0 else 0)
        # More than a pipe takes at once.
        return piece, os.getpid(), bytes(300_000 if piece % 3 == 0 else 3)

    found = list(spread(slow_at_first, 20, 3))
    assert [piece for piece, _, _ in found] == list(range(20))
    assert len(found[0][2]) == 300_000
    workers = {pid for _, pid, _ in found}
    assert len(workers) > 1
    assert os.getpid() not in workers
    assert all(gone(pid) for pid in workers)
    assert {pid for _, pid, _ in spread(slow_at_first, 2, 1)} == {os.getpid()}


def test_an_error_comes_in_its_turn_as_it_was_raised() -> None:
    def refuse_the_third(piece: int) -> int:
        if piece == 2:
            raise FieldError("lora_r", piece, "another one")
        return piece

    results = spread(refuse_the_third, 9, 2)
    assert list(islice(results, 2)) == [0, 1]
    with pytest.raises(FieldError, match=r"^lora_r: 2 is not accepted; expected another one$") as raised:
        next(results)
    assert (raised.value.field, raised.value.value) == ("lora_r", 2)


def test_a_process_that_is_killed_is_told_and_not_waited_for() -> None:
    def die(piece: int) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError(piece)

    with pytest.raises(VramwiseError, match="a process that shared the work was killed by SIGKILL"):
        list(spread(die, 2, 2))


def test_processes_end_with_whoever_wanted_their_work() -> None:
    def long_after_the_first(piece: int) -> int:
        time.sleep(0 if piece < 2 else 60)
        return os.getpid()

    results = spread(long_after_the_first, 8, 2)
    workers = [next(results), next(results)]
    results.close()
    assert all(gone(pid) for pid in workers)

    def quick(piece: int) -> int:
        time.sleep(0.01)
        return os.getpid()

    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        for pid in islice(spread(quick, 10_000_000, 2), 10):
            os.write(writing, pid.to_bytes(8))
        signal.pause()
    os.close(writing)
    workers = [int.from_bytes(os.read(reading, 8)) for _ in range(10)]
    os.close(reading)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert len(set(workers)) == 2
    assert all(gone(pid) for pid in workers)


def test_nothing_is_forked_beside_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    assert usable_processes() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert usable_processes() == 1


def test_work_beside_other_work() -> None:
    here = os.getpid()
    with beside(os.getpid, 2) as found:
        other = found()
    assert other != here
    assert gone(other)
    with beside(os.getpid, 1) as found:
        assert found() == here

    def refuse() -> NoReturn:
        raise FieldError("lora_r", 3, "another one")

    with beside(refuse, 2) as refused, pytest.raises(FieldError, match="lora_r: 3"):
        refused()
