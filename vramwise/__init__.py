"""Plan a fine-tuning, and run the plan in a training script of your own.

    plan = vramwise.make_plan(vramwise.make_request("llama-3.2-1b", gpu="12GB"))
    trainer = SFTTrainer(
        model=plan.model.hub_id,
        args=vramwise.sft_config(plan, output_dir="out"),
        train_dataset=rows,
        peft_config=vramwise.lora_config(plan),
        quantization_config=vramwise.quantization_config(plan),
        callbacks=[vramwise.PlanCallback(plan)],
    )

What plans is the package `planner` and needs no torch; what makes arguments and compares needs
`vramwise[train]`. Everything is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import planner
from planner.base.lazy import lazy_names

if TYPE_CHECKING:
    from planner import (
        DatasetStats,
        Estimate,
        Estimator,
        GpuSpec,
        GpuTarget,
        InputError,
        MemoryBreakdown,
        ModelSpec,
        NotModelledError,
        Plan,
        PlanRequest,
        StepEstimate,
        TrainingSetup,
        VramwiseError,
        estimate,
        make_plan,
        make_request,
        resolve_gpu,
        resolve_model,
    )
    from vramwise.arguments import lora_config, quantization_config, sft_config
    from vramwise.callback import PlanCallback
    from vramwise.comparison import Comparison, Difference

_NEED_STACK = {
    "PlanCallback": "vramwise.callback",
    "lora_config": "vramwise.arguments",
    "quantization_config": "vramwise.arguments",
    "sft_config": "vramwise.arguments",
}
_HOMES = {
    **dict.fromkeys(planner.__all__, "planner"),
    **_NEED_STACK,
    "Comparison": "vramwise.comparison",
    "Difference": "vramwise.comparison",
}

__all__ = [
    "Comparison",
    "DatasetStats",
    "Difference",
    "Estimate",
    "Estimator",
    "GpuSpec",
    "GpuTarget",
    "InputError",
    "MemoryBreakdown",
    "ModelSpec",
    "NotModelledError",
    "Plan",
    "PlanCallback",
    "PlanRequest",
    "StepEstimate",
    "TrainingSetup",
    "VramwiseError",
    "estimate",
    "lora_config",
    "make_plan",
    "make_request",
    "quantization_config",
    "resolve_gpu",
    "resolve_model",
    "sft_config",
]

_find, __dir__ = lazy_names(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    if name in _NEED_STACK:
        from launcher.runs.stack import require

        require(f"{__name__}.{name}")
    return _find(name)
