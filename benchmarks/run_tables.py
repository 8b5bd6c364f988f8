"""What the model said of runs below a memory cap and of runs on batches of many lengths, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.caps import OVER
from benchmarks.held_out import compared
from benchmarks.markdown import wrapped
from planner.calibration.accuracy import shipped_records
from planner.calibration.records import RunRecord
from planner.gpus.catalog import gpu_catalog
from planner.memory import MemoryBreakdown, estimate_memory
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE
from planner.setup.run import TrainingRun

GIB = 2**30
GPU = "h100-80gb"
ALLOCATOR_WORDS = {EXPANDABLE: "expandable segments", NATIVE: "torch's default"}
TIGHT = 0.995
"""Share of a card from which an upper end was brought there on purpose (benchmarks.caps)."""


def estimated(record: RunRecord, *, replay: bool = False) -> MemoryBreakdown:
    """What the model says of a run."""
    gpu, model = gpu_catalog().get(record.environment.gpu_id), load_shipped(record.setup.model)
    return estimate_memory(
        TrainingRun(setup=record.setup, model=model, padded=record.padded),
        gpu=gpu,
        replay=replay,
        allocator=record.allocator,
    )


def capped(_: str) -> str:
    """How runs below a capped allocator ended, by what was said of them before."""
    groups: dict[str, list[RunRecord]] = {
        "the plan's choice, uncompiled, all or no layers checkpointed": [],
        "the plan's choice, compiled or k of L layers checkpointed": [],
        "the longest length or largest batch whose interval ends within the card": [],
        f"expected at {OVER - 1:.0%} or more above the card": [],
    }
    plain, chosen, tight, over = groups.values()
    for record in shipped_records():
        said, cap = record.predicted, record.memory_cap_bytes
        if cap is None or said is None or not record.fills_its_length:
            continue
        usable = cap + said.process_bytes - said.reserved_bytes
        if said.process_bytes > usable:
            over.append(record)
        elif record.setup.compile != "none" or record.setup.checkpointed_layers is not None:
            chosen.append(record)
        else:
            (tight if said.process_upper_bytes > TIGHT * usable else plain).append(record)
    lines = [
        "| said before the run | runs | ran | out of memory | reserved, % of the cap |",
        "|---|---|---|---|---|",
    ]
    for what, found in groups.items():
        ran = sum(record.outcome == "ok" for record in found)
        lines.append(f"| {what} | {len(found)} | {ran} | {len(found) - ran} | {_reserved_of_cap(found)} |")
    return "\n".join([*lines, ""])


def _reserved_of_cap(records: Sequence[RunRecord]) -> str:
    shares = [
        100 * step.reserved_bytes / record.memory_cap_bytes
        for record in records
        if record.memory_cap_bytes and (step := record.phase("step"))
    ]
    return f"{min(shares):.1f} to {max(shares):.1f}" if shares else ""


def lengths(_: str) -> str:
    """Runs on batches of many lengths beside what is predicted for batches of the longest."""
    lines = [
        "| run | model | batches | GPU | allocator | allocated, predicted, GiB | reserved, predicted, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in shipped_records():
        step = record.phase("step")
        if not record.lengths or step is None:
            continue
        found, setup = estimated(record, replay=True), record.setup
        batches = "packed" if setup.packing else setup.train_sampling_strategy.replace("_", " ")
        batches += f", {setup.attn_implementation or 'sdpa'}" + ", compiled" * (setup.compile != "none")
        figures = [
            f"{measured / GIB:.2f}, {predicted / GIB:.2f}"
            for measured, predicted in (
                (step.allocated_bytes, found.allocated_bytes),
                (step.reserved_bytes, found.reserved_bytes),
            )
        ]
        where = f"{record.environment.gpu_id} | {ALLOCATOR_WORDS[record.allocator]}"
        lines.append(f"| {record.id} | {setup.model} | {batches} | {where} | {' | '.join(figures)} |")
    return "\n".join([*lines, ""])


def allocators(_: str) -> str:
    """What the reference reserved beyond allocated memory in the setups that ran with both allocators."""
    measured = [
        {(run.record.setup, run.record.padded): _beyond_allocated(run.record) for run in compared(GPU, one)}
        for one in ALLOCATOR_WORDS
    ]
    both = sorted(measured[0].keys() & measured[1].keys(), key=str)
    parts = [
        f"{statistics.median(found):.1%} in the median and at most {max(found):.1%} with {words}"
        for words, found in zip(
            ALLOCATOR_WORDS.values(), ([one[key] for key in both] for one in measured), strict=True
        )
    ]
    return wrapped(
        f"{len(both)} setups were measured with both: reserved memory is above allocated by "
        f"{', by '.join(parts)}."
    )


def _beyond_allocated(record: RunRecord) -> float:
    step = record.phase("step")
    if step is None:
        raise ValueError(f"{record.id}: no step was measured")
    return step.reserved_bytes / step.allocated_bytes - 1
