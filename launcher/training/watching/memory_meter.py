"""Peaks of memory by phase, as a training process tells them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from launcher.runs.events import Event, MemoryEvent
from launcher.training.several.ranks import ALONE, Ranks

DRIVER_READING_SECONDS = 10.0


@dataclass(slots=True)
class MemoryMeter:
    """Peaks of each phase, told to `write` whenever one grows.

    `read_driver_bytes` says what the driver shows as used on the GPU, less what it showed before this process
    took any; None if unknown. On several GPUs the largest of all ranks is told, and each one's.
    """

    write: Callable[[Event], None]
    on_gpu: bool
    read_driver_bytes: Callable[[], int | None]
    ranks: Ranks = ALONE
    _peaks: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    _told: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _driver_bytes: int | None = None
    _read_at: float = -math.inf

    def close(self, phase: str, step: int) -> None:
        """Count everything since the last call to this phase."""
        known = self._peaks.get(phase, (-1, -1, -1))
        allocated = torch.cuda.max_memory_allocated() if self.on_gpu else 0
        reserved = torch.cuda.max_memory_reserved() if self.on_gpu else 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        grew = allocated > known[0] or reserved > known[1]
        if grew or time.monotonic() - self._read_at > DRIVER_READING_SECONDS:
            self._driver_bytes = self.read_driver_bytes() if self.on_gpu else _resident_bytes()
            self._read_at = time.monotonic()
        peaks = (
            max(allocated, known[0]),
            max(reserved, known[1]),
            max(-1 if self._driver_bytes is None else self._driver_bytes, known[2]),
        )
        self._peaks[phase] = peaks
        every = self.ranks.exchange(*peaks)
        largest = (max(own) for own in zip(*every, strict=True))
        self._tell(phase, step, tuple(largest), every)

    def _tell(self, phase: str, step: int, peaks: tuple[int, ...], every: Sequence[tuple[int, ...]]) -> None:
        if self._told.get(phase) == peaks:
            return
        self._told[phase] = peaks
        self.write(
            MemoryEvent(
                time=time.time(),
                phase=phase,
                step=step,
                allocated_bytes=peaks[0] if self.on_gpu else None,
                reserved_bytes=peaks[1] if self.on_gpu else None,
                process_bytes=peaks[2] if peaks[2] >= 0 else None,
                ranks={} if self.ranks.alone else {str(rank): list(own) for rank, own in enumerate(every)},
            )
        )


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
