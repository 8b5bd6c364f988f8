"""Limits of time and memory for what comes with a model and is run in this process: its chat template.

Templates run in jinja's sandbox (transformers' ImmutableSandboxedEnvironment), which has neither files nor
network, but loops and strings of any size.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from planner.base.errors import InputError

CPU_SECONDS = 10.0
"""A long conversation is rendered in milliseconds."""
MORE_BYTES = 2**30
"""Beyond what the process holds already; a rendered text has kilobytes."""
_MEMORY = Path("/proc/self/statm")
_DATA_FIELD = 5
"""Pages of data and stack (proc(5)): what RLIMIT_DATA counts."""


class LimitError(InputError):
    """Something was ended that took more than it may; the message says of what."""


class _TimeUpError(Exception):
    pass


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """End what is done within after CPU_SECONDS of this process's CPU time, or at MORE_BYTES more of memory.

    The time is watched in the main thread alone, the memory on Linux alone. Time is looked at between two
    operations of Python, of which none takes long within the memory.

    Raises:
        LimitError: it was ended; `what` begins the message.
    """
    try:
        with _less_memory(), _less_time():
            yield
    except _TimeUpError:
        raise LimitError(f"{what} takes more than {CPU_SECONDS:g} s of CPU time") from None
    except MemoryError:
        raise LimitError(f"{what} takes more than {MORE_BYTES / 2**30:g} GiB of memory") from None


@contextlib.contextmanager
def _less_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _TimeUpError

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _less_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(_MEMORY.read_text(encoding="ascii").split()[_DATA_FIELD]) * os.sysconf("SC_PAGE_SIZE")
    limits = [held + MORE_BYTES, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
