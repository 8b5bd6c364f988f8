"""How a run is asked to end: a file that says how soon, and the signals that follow when nothing happens.

Light: no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.runs.folder import RunFolder
from launcher.runs.locks import live_pid

AFTER_STEP, NOW, KILL = "step", "now", "kill"
"""After the present step with all saved; at once, keeping what is saved already; by SIGKILL."""
_ORDER = (AFTER_STEP, NOW, KILL)
PATIENCE_SECONDS = 10.0
"""From the request to end at once to SIGKILL: as long as `docker stop` waits."""
SECOND_SIGNAL_SECONDS = 0.2
"""Between two SIGTERM, which the kernel would else hand over as one."""


def ask(folder: RunFolder, how: str) -> None:
    """Ask trainer and keeper for an end; a request that is there already never becomes a milder one.

    Raises:
        OSError: the file cannot be written, and there is no trainer that a signal could tell.
    """
    before = asked(folder)
    if before is not None and _ORDER.index(before) >= _ORDER.index(how):
        return
    try:
        # Made before it is written to: on a full disk an empty file still asks for a stop.
        folder.stop.touch()
        folder.stop.write_text("" if how == AFTER_STEP else how, encoding="ascii")
    except OSError:
        pid = live_pid(folder, "trainer")
        if pid is None:
            raise
        os.kill(pid, signal.SIGKILL if how == KILL else signal.SIGTERM)


def asked(folder: RunFolder) -> str | None:
    """How the run was asked to end; None if it was not."""
    try:
        with folder.stop.open("rb") as file:
            text = file.read(16).decode("ascii", "replace").strip()
    except OSError:
        return None
    return text if text in _ORDER else AFTER_STEP


@dataclass(slots=True)
class Ender:
    """Ends a process that was asked to end at once: SIGTERM twice (a stop, then one at once), then SIGKILL.

    `tick` does what is due and returns at once.
    """

    send: Callable[[int], None]
    patience_seconds: float = PATIENCE_SECONDS
    _begun: float | None = field(default=None, init=False)
    _sent: int = field(default=0, init=False)

    def tick(self, how: str, now: float) -> None:
        """Do what is due `now` (a reading of the monotonic clock) for a request of this kind."""
        if how == AFTER_STEP:
            return
        if self._begun is None:
            self._begun = now
        waited = now - self._begun
        due = 1 + (waited >= SECOND_SIGNAL_SECONDS) + (waited >= self.patience_seconds)
        wanted = 3 if how == KILL else due
        if wanted <= self._sent:
            return
        self._sent = min(wanted, self._sent + 1) if wanted < 3 else 3
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL if self._sent == 3 else signal.SIGTERM)
