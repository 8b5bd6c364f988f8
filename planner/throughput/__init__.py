"""The throughput model: TrainingRun and GpuSpec -> StepEstimate."""

from __future__ import annotations

from planner.throughput.roofline import NoForecastError, StepEstimate, estimate_step

__all__ = ["NoForecastError", "StepEstimate", "estimate_step"]
