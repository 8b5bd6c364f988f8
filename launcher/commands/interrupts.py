"""Signals while a run is watched: counted, so that whoever watches answers them between two looks.

None of them raises, so that no moment is left in which a run is started and nobody knows of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

_TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(slots=True)
class Interrupts:
    """Context that counts signals: `presses` of Ctrl-C, the last signal that `asked` for an end, and whether
    the terminal has `gone`. A signal that was ignored when we were started (nohup) stays so, and so does
    SIGHUP as process 1, whose end would be that of the run.
    """

    presses: int = 0
    asked: int | None = None
    gone: bool = False
    _before: dict[int, Any] = field(default_factory=dict, init=False)

    def __enter__(self) -> Interrupts:
        for number in _TAKEN:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.presses += 1
        elif number != signal.SIGHUP:
            self.asked = number
        elif os.getpid() != 1:
            self.gone = True


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Have SIGTERM interrupt what is done before a run is started: as process 1 of a container it would else
    be ignored, and the container be killed after its patience.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
