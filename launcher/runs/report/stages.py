"""Stages of a run in words, and how long the present one has lasted: for whoever watches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from launcher.runs.events import StageEvent

STAGES: Mapping[str, str] = MappingProxyType(
    {
        "loading": "loading",
        "rehearsing": "the longest micro-batch first",
        "compiling": "compiling the layers",
        "training": "training",
        "evaluating": "evaluating",
        "saving": "saving",
        "waiting": "waiting",
    }
)
"""The stages that events and heartbeats name."""
STARTING = "starting Python and the training stack"
"""What goes on before the first event."""
FIRST_STEPS = ("loading", "rehearsing", "compiling")
"""Stages in which no step is counted yet, so that nothing but time tells that something goes on."""


def stage_text(event: StageEvent) -> str:
    """What the stage is, in words: the event's own where those say all, else its own come last."""
    words = STAGES.get(event.stage, str(event.stage))
    if event.stage in ("loading", "rehearsing") and event.message:
        return str(event.message)
    return f"{words}: {event.message}" if event.message else words


def seconds(value: float) -> str:
    """Elapsed time, short: 7 s, 2 min 10 s, 1 h 05 min."""
    whole = max(0, int(value))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
