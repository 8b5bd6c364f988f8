"""Calibration in a process of its own, since what measures imports torch: started, heard, ended."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launcher.tui.run_facts import is_number

_PROGRESS = re.compile(r"\[(\d+)/(\d+)\] (.*)")
MOST_RESIDUALS = 500


@dataclass(frozen=True, slots=True)
class Heard:
    """A line of the calibration: of `total` runs so many have `ended`, where it says so."""

    text: str
    ended: int | None = None
    total: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedRun:
    """A run beside the fit without its model: predicted over measured, less one; null: not its own figure."""

    model: str
    allocated: float
    reserved: float
    process: float | None


@dataclass(slots=True)
class Calibrating:
    """`vramwise calibrate`, for so many minutes."""

    minutes: float
    _child: subprocess.Popen[str] | None = field(default=None, init=False)

    def run(self, hear: Callable[[Heard], None]) -> tuple[tuple[FittedRun, ...], str]:
        """Measure and fit; `hear` is told each line. Returns the fit's runs, and why there are none."""
        last = ""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
            self._child = subprocess.Popen(  # noqa: S603  our own interpreter and module
                command_line(self.minutes),
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.PIPE,
                text=True,
            )
            for line in self._child.stderr or ():
                if line.strip():
                    last = line.strip()
                    hear(heard(last))
            code = self._child.wait()
            told.seek(0)
            answer = told.read()
        if code:
            return (), last or f"calibrate ended with exit code {code}"
        return fitted_runs(answer), ""

    def stop(self) -> None:
        """Ask for an end, as Ctrl-C does: what was measured is kept and fitted."""
        if self._child is not None and self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGINT)


def command_line(minutes: float) -> list[str]:
    """The calibration's command."""
    return [sys.executable, "-m", "launcher.cli", "calibrate", "--json", "--minutes", f"{minutes:g}"]


def heard(line: str) -> Heard:
    """A line of the calibration's stderr."""
    found = _PROGRESS.fullmatch(line)
    if found is None:
        return Heard(line)
    return Heard(found[3], ended=int(found[1]), total=int(found[2]))


def fitted_runs(answer: str) -> tuple[FittedRun, ...]:
    """The residuals of what the calibration printed; of another answer none."""
    try:
        values = json.loads(answer)
    except ValueError:
        return ()
    rows: Any = values.get("residuals") if isinstance(values, dict) else None
    found = []
    for row in rows if isinstance(rows, list) else []:
        figures = [row.get(f"{name}_error") for name in ("allocated", "reserved", "process")]
        if is_number(figures[0]) and is_number(figures[1]):
            process = figures[2] if is_number(figures[2]) else None
            found.append(
                FittedRun(
                    model=str(row.get("model")), allocated=figures[0], reserved=figures[1], process=process
                )
            )
    return tuple(found[:MOST_RESIDUALS])
