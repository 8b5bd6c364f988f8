"""The memory model: TrainingSetup and ModelSpec to MemoryBreakdown."""

from planner.memory.breakdown import Basis, Component, MemoryBreakdown, PhaseMemory
from planner.memory.estimate import estimate_memory

__all__ = ["Basis", "Component", "MemoryBreakdown", "PhaseMemory", "estimate_memory"]
