"""The memory model: TrainingRun -> MemoryBreakdown.

Each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.base.lazy import lazy_names

if TYPE_CHECKING:
    from planner.memory.breakdown import Basis, Component, MemoryBreakdown, PhaseMemory
    from planner.memory.estimate import estimate_memory, surely_exceeds

_HOMES = {
    "Basis": "planner.memory.breakdown",
    "Component": "planner.memory.breakdown",
    "MemoryBreakdown": "planner.memory.breakdown",
    "PhaseMemory": "planner.memory.breakdown",
    "estimate_memory": "planner.memory.estimate",
    "surely_exceeds": "planner.memory.estimate",
}

__all__ = ["Basis", "Component", "MemoryBreakdown", "PhaseMemory", "estimate_memory", "surely_exceeds"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
