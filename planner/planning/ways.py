"""Ways to use several GPUs: one of them alone, all with DDP, all with FSDP2; each is a request of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from planner.gpus.target import GpuTarget
from planner.setup.parallelism import DDP, FSDP
from planner.setup.request import PlanRequest


def ways(request: PlanRequest, target: GpuTarget) -> tuple[PlanRequest, ...]:
    """Requests that say how GPUs share the work, for one that leaves it open; itself where it does not.

    One GPU comes first: of what is as fast, the one with fewer GPUs is taken.
    """
    return tuple(_ways(request, target)) or (request,)


def _ways(request: PlanRequest, target: GpuTarget) -> Iterator[PlanRequest]:
    fixed = request.fixed
    count = fixed.get("num_processes", target.count)
    if "distributed" in fixed or not isinstance(count, int) or count == 1:
        return
    if "num_processes" not in fixed:
        yield request.with_knobs({"num_processes": 1})
    for name in (DDP, FSDP):
        yield request.with_knobs({"num_processes": count, "distributed": name})


def processes(request: PlanRequest, target: GpuTarget) -> int:
    """GPUs that a run of a request uses: as fixed; all where it says how they share the work; else one."""
    fixed = request.fixed.get("num_processes")
    if isinstance(fixed, int):
        return fixed
    return target.count if "distributed" in request.fixed else 1


def with_processes(request: PlanRequest, target: GpuTarget) -> GpuTarget:
    """The target with as many GPUs as are asked for: of a card that is named without a number, or of several
    machines like this one; where all are used, with what each of them leaves.
    """
    asked = request.fixed.get("num_processes")
    if isinstance(asked, int) and asked > target.count:
        notes = target.notes
        if request.gpu is None:
            here = f"this machine's {target.count}" if target.count > 1 else "one machine's"
            notes += (f"{asked} GPUs are more than {here}: what crosses machines is forecast as within one",)
        target = dataclasses.replace(target, count=asked, notes=notes)
    return target.of_all() if processes(request, target) > 1 else target
