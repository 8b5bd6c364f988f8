"""Samples: measured runs that calibration rests on, with what the model says of their parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from statistics import median_low

from planner.base.errors import InputError, NotModelledError
from planner.base.units import MIB
from planner.base.values import dataclass
from planner.calibration.records import RunRecord
from planner.gpus.spec import GpuSpec
from planner.memory.breakdown import MemoryBreakdown
from planner.memory.estimate import estimate_memory, reserve_terms
from planner.memory.measured.cuda_terms import managed_process_bytes, offloading_context_bytes
from planner.memory.measured.files import coefficients_for
from planner.models.spec import ModelSpec
from planner.setup.run import TrainingRun

CAP_SHARE = 0.85
"""Share of a memory cap below which a run never met it, so that its allocator gave no cached block back."""
LEFT_OVER_BYTES = 2 * MIB
"""What the driver's figure may move by while a model is loaded, beyond the allocator's segments."""
LOADED_BYTES = 16 * MIB
"""What kernels that only earlier runs in the process used may add to its context."""
BALANCED_UNTIL = "2026-12-01T12:20:00+00:00"
"""When the launcher left out TRL's loss for balanced experts (launcher/training/arguments.py), which keeps
the router logits of all layers: a mixture's run from before held what today's does not, 12,288 bytes a token
for Qwen3-30B-A3B.
"""
Resolve = Callable[[str], ModelSpec]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A run; `terms` are ReserveTerms, `workspace_bytes` what is allocated and not counted, `managed_bytes`
    what lies outside reserved memory beside the context. With `met_cap` its allocator gave blocks back.
    """

    record: RunRecord
    run: TrainingRun
    terms: tuple[float, ...]
    reserve_bytes: int
    managed_bytes: int
    workspace_bytes: int
    own_process_bytes: int | None
    met_cap: bool

    @property
    def beside_bytes(self) -> int:
        """What the driver shows beside reserved memory and the context of every run."""
        return managed_process_bytes(self.managed_bytes) + offloading_context_bytes(self.record.setup)

    @property
    def reserved_bytes(self) -> int:
        """Measured at the peak of a step.

        Raises:
            InputError: no step was measured.
        """
        step = self.record.phase("step")
        if step is None:
            raise InputError(f"{self.record.id}: no step was measured")
        return step.reserved_bytes


def clean_context_bytes(records: Sequence[RunRecord], gpu_id: str) -> int:
    """What the driver shows beyond reserved memory on a GPU in a process whose runs have left nothing but
    their kernels: the median at the end of a process's first run that had no managed memory (0 without one).
    One with flex attention is 14 MiB below it: it never loads sdpa's kernels.
    """
    steps = (
        record.phase("step")
        for record in records
        if record.environment.gpu_id == gpu_id and record.isolated and "paged" not in record.setup.optim
        if record.setup.num_processes == 1
    )
    beyond = [step.process_bytes - step.reserved_bytes for step in steps if step and step.process_bytes]
    return median_low(beyond) if beyond else 0


def own_process_bytes(record: RunRecord, clean_bytes: int = 0) -> int | None:
    """The driver's figure at the end of a step where it is the run's own; null where it is not, or not read.

    It is where the run was the first in its process. It is too where the context before it was a clean one
    (`clean_context_bytes`: managed memory, streams and compiled kernels of earlier runs stay in a process)
    and the driver showed no more after loading than that and reserved memory.
    """
    step, load = record.phase("step"), record.phase("load")
    if step is None or step.process_bytes is None or record.isolated:
        return None if step is None else step.process_bytes
    if load is None or load.process_bytes is None or record.context_bytes > clean_bytes + LOADED_BYTES:
        return None
    left = load.process_bytes - load.reserved_bytes - record.context_bytes
    return step.process_bytes if abs(left) <= LEFT_OVER_BYTES else None


def samples_of(records: Sequence[RunRecord], gpu: GpuSpec, resolve: Resolve) -> list[Sample]:
    """Samples of a GPU's runs that ran to their end, with full sequences, are modelled, and did what runs do
    today.
    """
    found = []
    clean = clean_context_bytes(records, gpu.id)
    for record in records:
        step = record.phase("step")
        if record.environment.gpu_id != gpu.id or record.outcome != "ok" or step is None:
            continue
        # What one GPU needs and does is learned from runs on one.
        if not record.fills_its_length or record.setup.num_processes > 1:
            continue
        model = resolve(record.setup.model)
        if record.created < BALANCED_UNTIL and any(layer.experts for layer in model.layers):
            continue
        run, allocator = record.run(model), record.allocator
        bare = dataclasses.replace(coefficients_for(gpu.id, allocator), gpu=gpu.id, workspace_bytes=0)
        try:
            breakdown = estimate_memory(run, gpu=gpu, allocator=allocator)
        except NotModelledError:
            continue
        without_workspace = estimate_memory(run, gpu=gpu, coefficients=bare, allocator=allocator)
        terms = reserve_terms(run, gpu=gpu, allocator=allocator)
        found.append(
            Sample(
                record=record,
                run=run,
                terms=tuple(float(value) for value in terms.as_tuple()),
                reserve_bytes=step.reserved_bytes - step.allocated_bytes,
                managed_bytes=_managed(breakdown),
                workspace_bytes=step.allocated_bytes - without_workspace.allocated_bytes,
                own_process_bytes=own_process_bytes(record, clean),
                met_cap=step.reserved_bytes > CAP_SHARE * (record.memory_cap_bytes or 2**60),
            )
        )
    return found


def _managed(breakdown: MemoryBreakdown) -> int:
    """Managed memory in an estimate: what is outside reserved memory and is not the context."""
    context = next(c.size_bytes for c in breakdown.components if c.name == "context")
    return breakdown.process_bytes - breakdown.reserved_bytes - context
