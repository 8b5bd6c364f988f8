"""What the trainer does now, told twice: as an event for whoever watches, as a beat for the keeper."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.runs.events import Event, StageEvent
from planner.answers.plan import Plan
from planner.text.speed import first_step_text

UNFORETOLD = "half a minute on a fast host and up to five minutes"
"""9 to 53 s on 16 cores, and 282 s in one run with flex attention (planner/throughput/compilation.py)."""


def compiling_words(plan: Plan | None) -> str:
    """How long compiling a run's layers is forecast to take."""
    if plan is None or plan.speed is None or plan.speed.first_step is None:
        return UNFORETOLD
    return first_step_text(plan.speed.first_step)


@dataclass(slots=True)
class Stages:
    """Writes a stage event where the stage changes, and a beat each time."""

    write: Callable[[Event], None]
    write_beat: Callable[[str, int], None]
    _present: str = field(default="", init=False)
    _step: int = field(default=0, init=False)

    def enter(self, stage: str, message: str = "") -> None:
        """Say that a stage begins, or what it does next."""
        self._present = stage
        self.write(StageEvent(time=time.time(), stage=stage, message=message))
        self.write_beat(stage, self._step)

    def beat(self, stage: str, step: int) -> None:
        """Say that a stage goes on after so many steps; a change of stage is an event too."""
        self._step = step
        if stage != self._present:
            self.enter(stage)
        else:
            self.write_beat(stage, step)
