"""Plan the memory and speed of LLM fine-tuning on a given GPU.

    from planner import estimate, make_plan, make_request
    plan = make_plan(make_request("qwen2.5-14b", gpu="16GB"))
    figures = estimate({"model": "qwen2.5-14b", "max_length": 4096}, gpu="16GB")

Everything is imported when it is first used. (`planner.plan` is the module of the type Plan, so the function
that makes one is `make_plan`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.dataset_stats import DatasetStats
    from planner.errors import InputError, NotModelledError, VramwiseError
    from planner.estimation import Estimate, Estimator, estimate
    from planner.gpu_spec import GpuSpec
    from planner.gpu_target import GpuTarget, resolve_gpu
    from planner.memory import MemoryBreakdown
    from planner.model_catalog import resolve_model
    from planner.model_spec import ModelSpec
    from planner.plan import Plan
    from planner.planning import make_plan
    from planner.request import PlanRequest, make_request
    from planner.throughput import StepEstimate
    from planner.training_setup import TrainingSetup

_HOMES = {
    "DatasetStats": "planner.dataset_stats",
    "Estimate": "planner.estimation",
    "Estimator": "planner.estimation",
    "GpuSpec": "planner.gpu_spec",
    "GpuTarget": "planner.gpu_target",
    "InputError": "planner.errors",
    "MemoryBreakdown": "planner.memory",
    "ModelSpec": "planner.model_spec",
    "NotModelledError": "planner.errors",
    "Plan": "planner.plan",
    "PlanRequest": "planner.request",
    "StepEstimate": "planner.throughput",
    "TrainingSetup": "planner.training_setup",
    "VramwiseError": "planner.errors",
    "estimate": "planner.estimation",
    "make_plan": "planner.planning",
    "make_request": "planner.request",
    "resolve_gpu": "planner.gpu_target",
    "resolve_model": "planner.model_catalog",
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


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
