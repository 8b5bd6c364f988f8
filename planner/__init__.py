"""Plan the memory and speed of LLM fine-tuning on a given GPU.

    from planner import estimate, make_plan, make_request
    plan = make_plan(make_request("qwen2.5-14b", gpu="16GB"))
    figures = estimate({"model": "qwen2.5-14b", "max_length": 4096}, gpu="16GB")

Everything is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.base.lazy import lazy_names

if TYPE_CHECKING:
    from planner.answers.plan import Plan
    from planner.base.errors import InputError, NotModelledError, VramwiseError
    from planner.data.lengths import DatasetStats
    from planner.gpus.spec import GpuSpec
    from planner.gpus.target import GpuTarget, resolve_gpu
    from planner.memory import MemoryBreakdown
    from planner.models.catalog import resolve_model
    from planner.models.spec import ModelSpec
    from planner.planning.estimation import Estimate, Estimator, estimate
    from planner.planning.make_plan import make_plan
    from planner.setup.request import PlanRequest, make_request
    from planner.setup.training_setup import TrainingSetup
    from planner.throughput import StepEstimate

_HOMES = {
    "DatasetStats": "planner.data.lengths",
    "Estimate": "planner.planning.estimation",
    "Estimator": "planner.planning.estimation",
    "GpuSpec": "planner.gpus.spec",
    "GpuTarget": "planner.gpus.target",
    "InputError": "planner.base.errors",
    "MemoryBreakdown": "planner.memory",
    "ModelSpec": "planner.models.spec",
    "NotModelledError": "planner.base.errors",
    "Plan": "planner.answers.plan",
    "PlanRequest": "planner.setup.request",
    "StepEstimate": "planner.throughput",
    "TrainingSetup": "planner.setup.training_setup",
    "VramwiseError": "planner.base.errors",
    "estimate": "planner.planning.estimation",
    "make_plan": "planner.planning.make_plan",
    "make_request": "planner.setup.request",
    "resolve_gpu": "planner.gpus.target",
    "resolve_model": "planner.models.catalog",
}

__all__ = [
    "DatasetStats",
    "Estimate",
    "Estimator",
    "GpuSpec",
    "GpuTarget",
    "InputError",
    "MemoryBreakdown",
    "ModelSpec",
    "NotModelledError",
    "Plan",
    "PlanRequest",
    "StepEstimate",
    "TrainingSetup",
    "VramwiseError",
    "estimate",
    "make_plan",
    "make_request",
    "resolve_gpu",
    "resolve_model",
]


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
