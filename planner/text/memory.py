"""The memory of a Plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.answers.plan import Plan
from planner.text.figures import WIDE, bar, columns, figure, gib, heading, pairs, signed_gib

if TYPE_CHECKING:
    from rich.console import Console


def print_memory(out: Console, plan: Plan, *, explain: bool = False) -> None:
    """Print the parts with bars, then the peak; with `explain` where each part comes from and each phase."""
    memory = plan.memory
    parts = [c for c in memory.components if c.size_bytes or explain]
    largest = max((c.size_bytes for c in parts), default=1) or 1
    heading(out, "Memory" + (" of each GPU" if plan.setup.num_processes > 1 else ""))
    heads = [("", "text"), ("GiB", "number")]
    wide = out.width >= WIDE
    width = min(30, out.width - 48)
    if wide:
        heads.append(("", "text"))
    rows = []
    for part in parts:
        row = [part.title, figure(part.size_bytes)]
        if wide:
            drawn = bar(out, part.size_bytes / largest, width)
            row.append(drawn if part.size_bytes else "not held at the peak")
        rows.append(row)
    total = ["what the driver will show", figure(memory.process_bytes)]
    rows.append([*total, ""] if wide else total)
    columns(out, heads, rows)
    if explain:
        heading(out, "Where each part comes from")
        pairs(out, ((part.title, part.origin) for part in parts))
    _peak(out, plan)
    if explain:
        heading(out, "Peak of each phase")
        pairs(
            out,
            (
                (
                    phase.name,
                    f"{gib(phase.process_bytes)}, at most {gib(phase.process_upper_bytes)} "
                    f"({phase.peak_moment})",
                )
                for phase in memory.phases
            ),
        )


def _peak(out: Console, plan: Plan) -> None:
    memory = plan.memory
    peak = memory.peak_phase
    out.print()
    held = f", {gib(plan.gpu.held_bytes)} taken already" if plan.gpu.held_bytes else ""
    pairs(
        out,
        [
            ("peak phase", f"{peak.name}: {peak.peak_moment}"),
            ("after loading", f"{gib(memory.weights_bytes)} allocated"),
            ("allocated", f"{gib(memory.allocated_bytes)} (torch.cuda.max_memory_allocated)"),
            ("reserved", f"{gib(memory.reserved_bytes)} (torch.cuda.max_memory_reserved)"),
            (
                "driver",
                f"{gib(memory.process_bytes)}, at most {gib(memory.process_upper_bytes)} (nvidia-smi)",
            ),
            ("usable", f"{gib(plan.gpu.usable_bytes)} of the card's {gib(plan.gpu.spec.memory_bytes)}{held}"),
            ("headroom", signed_gib(plan.headroom_bytes) if not plan.fits else gib(plan.headroom_bytes)),
        ],
    )
