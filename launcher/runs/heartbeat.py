"""The trainer's sign of life: one small file in the run folder, written in place at every micro-step.

Written by the thread that trains, never by one beside it: such a thread would beat on while the training
hangs. Light: no torch.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

STACKS_SIGNAL = signal.SIGUSR2
"""Has the trainer write the stacks of its threads into its log."""
_WIDTH_BYTES = 256
"""A beat is padded to this, so that a shorter one leaves nothing of a longer one behind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What the trainer did last: `stage` ("loading", "compiling", "training", "evaluating", "saving",
    "waiting"), the optimizer steps done, and `monotonic_seconds`, a clock that no correction moves.
    """

    stage: str
    step: int
    monotonic_seconds: float


@dataclass(slots=True)
class HeartbeatWriter:
    """Writes beats; one write of fixed width each, so that a reader never sees a mixture."""

    path: Path
    _descriptor: int = field(default=-1, init=False)

    def __enter__(self) -> HeartbeatWriter:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def beat(self, stage: str, step: int) -> None:
        """Say that `stage` goes on; a full disk leaves the last beat, whose room is taken already."""
        line = json.dumps({"stage": stage, "step": step, "monotonic_seconds": time.monotonic()})
        try:
            os.pwrite(self._descriptor, (line.ljust(_WIDTH_BYTES - 1) + "\n").encode("ascii"), 0)
        except OSError:
            return


def read_beat(path: Path) -> Beat | None:
    """The last beat; None if there is none to read."""
    try:
        values = json.loads(path.read_bytes())
        return Beat(
            stage=str(values["stage"]),
            step=int(values["step"]),
            monotonic_seconds=float(values["monotonic_seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
