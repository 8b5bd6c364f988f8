"""Another trainer's process: started by its own Python in the run folder, its lines read, its end told.

Light: no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.base.errors import InputError

REPORT = "VRAMWISE_REPORT"
POLL_SECONDS = 0.2
END_SECONDS = 10.0
"""How long it may take to end when it is told to, before it is killed."""
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Of this environment: another one's Python would import our packages by them."""


class Child:
    """A script that runs in `folder`, and what it tells. A context: no process is left behind.

    Raises:
        InputError: there is no such interpreter.
    """

    def __init__(self, python: str, script: str, folder: Path, variables: Mapping[str, str]) -> None:
        self._read, write = os.pipe()
        self._rest = b""
        kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        try:
            self.process = subprocess.Popen(  # noqa: S603 (the interpreter that a person named, no shell)
                [python, "-u", script],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                pass_fds=(write,),
                env={**kept, **variables, REPORT: str(write)},
            )
        except OSError as error:
            os.close(self._read)
            raise InputError(f"{python} cannot be run ({error.strerror})") from error
        finally:
            os.close(write)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(END_SECONDS)
        os.close(self._read)

    def lines(self) -> Iterator[Mapping[str, Any] | None]:
        """What it tells, as it comes, until it closes its end; None where there is nothing for a while."""
        while True:
            ready, _, _ = select.select([self._read], [], [], POLL_SECONDS)
            if not ready:
                # What it has started may hold the file open beyond its end.
                if self.process.poll() is not None:
                    return
                yield None
                continue
            content = os.read(self._read, 2**16)
            if not content:
                return
            *whole, self._rest = (self._rest + content).split(b"\n")
            for line in whole:
                with contextlib.suppress(ValueError):
                    told = json.loads(line)
                    if isinstance(told, dict) and isinstance(told.get("kind"), str):
                        yield told

    def ask_for_stop(self) -> None:
        """Have it end after the step that it is at."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def ended(self) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        return self.process.wait()
