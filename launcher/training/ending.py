"""How the training process ends: asked to by signal or file, or by an error, each told as an end event.

Light: no torch.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from launcher.runs.ends import RunExit, exit_code
from launcher.runs.events import EndEvent, EventWriter
from launcher.training.watching.patience import NO_ROOM, DiskError
from planner.base.errors import InputError, VramwiseError

# Said by torch's CPU allocator, by CUDA calls outside torch's allocator, and by cuBLAS.
OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(slots=True)
class StopRequest:
    """Whether somebody asked the run to end."""

    file: Path
    signalled: bool = field(default=False, init=False)
    _ended: int = field(default=0, init=False)

    def install(self) -> None:
        """Take over the signals."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def requested(self) -> bool:
        """Whether a signal has come or the file is there."""
        return self.signalled or self.file.exists()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        # SIGUSR1 is a scheduler's warning, which a SIGTERM follows: only a second one of the others hurries.
        if number == signal.SIGUSR1:
            return
        self._ended += 1
        # Once: what an end at once has to say is not to be cut off by a third.
        if self._ended == 2:
            raise KeyboardInterrupt


@dataclass(slots=True)
class RunEnd:
    """Context of a run that writes the end event, whatever ends it, and knows the exit code.

    Of several ranks one writes it, the others `tell` their end to the keeper alone; an error that nobody
    foresaw is told to it by all, since it may come of another rank's death.

    Errors that are no bug end here; any other passes on after its event, so that its traceback is in the log.
    """

    writer: EventWriter
    step: int = 0
    state: str = "finished"
    message: str = ""
    room: Callable[[], int | None] = field(default=lambda: None)
    tell: Callable[[EndEvent], None] | None = None
    writes: bool = True

    @property
    def code(self) -> RunExit:
        """What the process exits with."""
        return exit_code(self.state)

    def __enter__(self) -> RunEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        understood = True
        if error is not None:
            self.message = f"{type(error).__name__}: {error}"
            understood = self._classify(error)
        room = self.room() if self.state == "oom" else None
        if room is not None:
            self.message += f"; other processes leave {room / 2**30:.2f} GiB of the GPU"
        end = EndEvent(
            time=time.time(),
            state=self.state,
            message=self.message[:2000],
            step=self.step,
            room_bytes=room,
        )
        kept_back = self.tell is not None and self.state == "failed"
        if self.tell is not None and (kept_back or not self.writes) and error is not None:
            self.tell(end)
        if self.writes and not kept_back:
            self.writer.write(end)
        return understood

    def stopped(self, message: str) -> None:
        """The run ended on request."""
        self.state, self.message = "stopped", message

    def _classify(self, error: BaseException) -> bool:
        if isinstance(error, KeyboardInterrupt):
            self.state = "interrupted"
            self.message = "stopped at once by a second signal; the adapter was not saved"
        elif is_out_of_memory(error):
            self.state = "oom"
        elif isinstance(error, DiskError) or (isinstance(error, OSError) and error.errno in NO_ROOM):
            self.state = "disk"
            self.message = str(error)
        elif type(error).__name__ == "DivergedError":
            self.state, self.message = "diverged", str(error)
        elif isinstance(error, VramwiseError):
            self.state = "refused" if isinstance(error, InputError) else "failed"
            self.message = str(error)
        else:
            self.state = "failed"
            return False
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the GPU or the host ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)
