"""Whether a GPU has the room that a run needs, who holds what is missing, and waiting for it.

What is looked at is the memory that is free now. A run that would not have room on the empty card either is
not waited for: that is for its plan to say. Light: no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from launcher.runs.minding.gpu_lock import who_holds
from planner.base.errors import ExitCode, VramwiseError
from planner.gpus.detect import GpuProcess, LocalGpu, NoGpuError, local_gpus
from planner.text.figures import gib

WAIT_SECONDS = 2.0
"""Between two looks at the driver; each opens and closes NVML."""
SETTLING_SECONDS = 3.0
"""What a process held that has just ended is free a moment later; after so long it is held."""
TOLD_AGAIN_SECONDS = 60.0
"""While the same processes hold a GPU, how much is missing is told again after so long at the earliest."""
NAMED_PROCESSES = 3


class GpuFullError(VramwiseError):
    """Other processes hold so much of the GPU that the run has no room; `need_bytes` is what it needs."""

    exit_code = ExitCode.DOES_NOT_FIT

    def __init__(self, message: str, need_bytes: int) -> None:
        self.need_bytes = need_bytes
        super().__init__(message)


class GpuTooSmallError(VramwiseError):
    """A run needs more than the GPU has when nothing else is on it."""

    exit_code = ExitCode.DOES_NOT_FIT


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortage:
    """What a GPU (`index` is NVML's) lacks for a run because other processes hold it."""

    index: int
    need_bytes: int
    free_bytes: int
    processes: tuple[GpuProcess, ...]

    def __str__(self) -> str:
        missing = gib(self.need_bytes - self.free_bytes)
        return (
            f"{missing} are missing on GPU {self.index}: the run needs {gib(self.need_bytes)}, "
            f"{gib(self.free_bytes)} are free, and others hold the rest{self._named()}"
        )

    def _named(self) -> str:
        """The largest holders that the driver names; those of other containers it does not."""
        largest = sorted(self.processes, key=lambda one: -(one.used_bytes or 0))[:NAMED_PROCESSES]
        named = [
            f"process {one.pid}" + ("" if one.used_bytes is None else f": {gib(one.used_bytes)}")
            for one in largest
        ]
        more = len(self.processes) - len(named)
        return f" ({', '.join(named)}{f' and {more} more' if more else ''})" if named else ""


def shortage(position: int, need_bytes: int) -> Shortage | None:
    """What the visible GPU at a position lacks now; None where there is room, no such GPU, or where the empty
    card would have no room either.
    """
    gpu = _at(position)
    if gpu is None or not gpu.free_bytes < need_bytes <= gpu.spec.usable_bytes:
        return None
    return Shortage(
        index=gpu.index, need_bytes=need_bytes, free_bytes=gpu.free_bytes, processes=gpu.processes
    )


def lasting_shortage(position: int, need_bytes: int) -> Shortage | None:
    """The same, of what does not go by itself within a moment."""
    until = time.monotonic() + SETTLING_SECONDS
    while (lacking := shortage(position, need_bytes)) is not None and time.monotonic() < until:
        time.sleep(SETTLING_SECONDS / 6)
    return lacking


def in_the_way(position: int, need_bytes: int | None) -> str | None:
    """Why a run cannot begin on a GPU now, in a sentence: another run trains there, or there is no room
    (where `need_bytes` is known); None if nothing is in the way.
    """
    gpu = _at(position)
    busy = None if gpu is None else who_holds(gpu.uuid)
    if busy is not None or need_bytes is None:
        return busy
    lacking = shortage(position, need_bytes)
    return None if lacking is None else str(lacking)


def refuse_full_gpu(position: int, need_bytes: int) -> None:
    """See that a GPU has room for a run.

    Raises:
        GpuFullError: other processes hold what is missing.
    """
    lacking = lasting_shortage(position, need_bytes)
    if lacking is not None:
        raise GpuFullError(f"{lacking}; --wait waits until it is free", need_bytes)


def refuse_small_gpu(position: int, need_bytes: int, what: str) -> None:
    """See that a GPU would have room for a run if nothing else were on it; `what` names the run.

    Raises:
        GpuTooSmallError: it would not.
    """
    gpu = _at(position)
    if gpu is not None and need_bytes > gpu.spec.usable_bytes:
        raise GpuTooSmallError(
            f"{what} needs {gib(need_bytes)} on each GPU, and GPU {gpu.index} ({gpu.spec.name}) has "
            f"{gib(gpu.spec.usable_bytes)} when nothing else is on it"
        )


def wait_for_room(position: int, need_bytes: int, tell: Callable[[str], None]) -> None:
    """Return when a GPU has room for a run; what is missing is told when others hold it, and now and then."""
    holders: frozenset[int] | None = None
    told_at = 0.0
    while (lacking := shortage(position, need_bytes)) is not None:
        now, them = time.monotonic(), frozenset(one.pid for one in lacking.processes)
        if them != holders or now - told_at >= TOLD_AGAIN_SECONDS:
            tell(f"{lacking}; waiting until it is free")
            holders, told_at = them, now
        time.sleep(WAIT_SECONDS)


def _at(position: int) -> LocalGpu | None:
    try:
        gpus = local_gpus()
    except NoGpuError:
        return None
    return gpus[position] if position < len(gpus) else None
