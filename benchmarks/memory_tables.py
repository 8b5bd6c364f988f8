"""The numbers of docs/memory-model.md: `python -m benchmarks.memory_tables` prints the page with them.

Each block of that page between `<!-- memory: NAME -->` and `<!-- end of memory -->` is computed from the
committed records, each model left out of the fit that predicts it. Of tables whose rows have words as well,
the cells after the words are filled.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.held_out import Compared, calibration, compared
from benchmarks.markdown import filled, median_and_bias, median_and_worst, size, wrapped
from benchmarks.results import FOLDER
from benchmarks.run_tables import ALLOCATOR_WORDS, allocators, capped, estimated, lengths
from planner.base.units import MIB
from planner.calibration.accuracy import accuracy, shipped_records
from planner.calibration.margins import HeldOutThing
from planner.calibration.records import RunRecord
from planner.memory.measured.coefficients import interval_kind
from planner.memory.measured.cuda_terms import managed_process_bytes
from planner.setup.cuda_allocator import ALLOCATORS, NATIVE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory-model.md"
REFERENCE = "h100-80gb"
GPUS = (REFERENCE, "h200")
BEYOND = 0.02
LISTED_RATIO = 0.6
"""Things below that are summed up: the interval learned without them held with much to spare."""
KINDS = {
    "share: adapters, every layer checkpointed": "checkpointed",
    "share: adapters, layers that keep more or move it": "kept",
    "share: adapters, compiled layers": "compiled",
    "share: full fine-tuning": "full",
}
"""Rows of the interval's table by kind (runtime.interval_kind)."""
_BLOCK = re.compile(r"(<!-- memory: ([\w ]+) -->\n)(.*?)(<!-- end of memory -->\n)", re.DOTALL)


def runs(_: str) -> str:
    """How many runs there are, errors after loading, and errors of each figure by GPU and allocator."""
    lines = [
        "| GPU | allocator | figure | runs | median | 95th percentile | worst | bias |",
        "|---|---|---|---|---|---|---|---|",
    ]
    counts = []
    for found in accuracy(shipped_records()):
        words = ALLOCATOR_WORDS[found.allocator]
        counts.append(
            f"{found.overall[0].runs} runs of {len(found.models)} models on {found.gpu} with {words}"
        )
        for one in found.overall:
            if one.median is None or one.percentile_95 is None or one.worst is None or one.bias is None:
                continue
            high = (
                f"{size(one.median, 3 if one.figure == 'allocated' else 2)}% | {size(one.percentile_95, 2)}%"
            )
            lines.append(
                f"| {found.gpu} | {words} | {one.figure} | {one.runs} | {high} | {one.worst:+.2%} "
                f"| {one.bias:+.2%} |"
            )
    loaded = [
        estimated(run.record).weights_bytes / run.record.weights_bytes - 1
        for run in _of_all_gpus(*ALLOCATORS)
    ]
    middle = size(statistics.median(map(abs, loaded)), 3)
    text = f"{', '.join(counts)}. Weights after loading: median {middle}%, worst {max(loaded, key=abs):+.3%}."
    return wrapped(text) + "\n" + "\n".join([*lines, ""])


def _of_all_gpus(*allocators: str) -> list[Compared]:
    return [run for gpu_id in GPUS for allocator in allocators for run in compared(gpu_id, allocator)]


def elsewhere(_: str) -> str:
    """Errors on GPUs other than the first."""
    parts = [
        f"{found.overall[0].runs} runs of {len(found.models)} models on an {found.gpu.upper()} with "
        f"{ALLOCATOR_WORDS[found.allocator]}: at worst "
        + ", ".join(f"{one.figure} {one.worst:+.1%}" for one in found.overall if one.worst is not None)
        for found in accuracy(shipped_records())
        if found.gpu != REFERENCE
    ]
    return wrapped("; ".join(parts) + ", predicted from its other runs in the same way.")


def knobs(old: str) -> str:
    """Errors of the runs that have each knob, those with torch's default allocator last."""

    def cells(label: str) -> list[str]:
        own = [run.residual for run in compared(REFERENCE) if run.is_of(label)]
        process = [one.process_error for one in own if one.process_error is not None]
        default = [run.residual for run in compared(REFERENCE, NATIVE) if run.is_of(label)]
        return [
            str(len(own)),
            median_and_worst([one.allocated_error for one in own], 3),
            median_and_worst([one.reserved_error for one in own], 2),
            f"{len(process)}: {median_and_worst(process, 2)}" if process else "",
            str(len(default)),
            median_and_worst([one.allocated_error for one in default], 3),
            median_and_worst([one.reserved_error for one in default], 2),
        ]

    return filled(old, cells)


def beyond(_: str) -> str:
    """The runs whose driver's figure was above the expected one by more than BEYOND, by allocator."""
    parts = []
    for allocator in ALLOCATORS:
        own = [(run.residual.process_error, run) for run in compared(REFERENCE, allocator)]
        errors = sorted((error, run.record.id, run) for error, run in own if error is not None)
        above = [(error, run) for error, _, run in errors if error < -BEYOND]
        count = f"{len(above) or 'none'} of {len(errors)} runs with {ALLOCATOR_WORDS[allocator]}"
        named = ", ".join(f"{run.residual.model}, {run.knobs}, {error:+.2%}" for error, run in above)
        parts.append(f"{count} ({named or f'the lowest: {errors[0][0]:+.2%}'})")
    return wrapped(
        f"The driver's figure is more than {BEYOND:.0%} above the expected one in {' and '.join(parts)}."
    )


def processes(_: str) -> str:
    """Errors of runs that were the first in their process, and of later ones."""
    lines = [
        "| process | allocator | runs | allocated: median, bias | reserved: median, bias "
        "| process: median, bias | beyond reserved and managed memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = [(first, allocator) for first in (True, False) for allocator in ALLOCATORS]
    for first, allocator in groups:
        name = f"{'the first run' if first else 'later, in a clean process'} | {ALLOCATOR_WORDS[allocator]}"
        own = [
            run
            for run in compared(REFERENCE, allocator)
            if run.record.isolated == first and run.residual.process_error is not None
        ]
        residuals = [run.residual for run in own]
        parts = [
            median_and_bias([one.allocated_error for one in residuals], 3),
            median_and_bias([one.reserved_error for one in residuals], 2),
            median_and_bias([one.process_error or 0.0 for one in residuals], 2),
        ]
        rest = sorted(_beyond_reserved(run.record) / MIB for run in own)
        span = f"{rest[0]:.0f} to {rest[-1]:.0f}, median {statistics.median(rest):.0f}"
        lines.append(f"| {name} | {len(own)} | {' | '.join(parts)} | {span} |")
    return "\n".join([*lines, ""])


def _beyond_reserved(record: RunRecord) -> int:
    found, step = estimated(record), record.phase("step")
    context = next(part.size_bytes for part in found.components if part.name == "context")
    managed = managed_process_bytes(found.process_bytes - found.reserved_bytes - context)
    if step is None or step.process_bytes is None:
        raise ValueError(f"{record.id}: the driver's figure was not read")
    return step.process_bytes - step.reserved_bytes - managed


def replay_and_fit(_: str) -> str:
    """Both ways of telling reserved memory; times are those of benchmarks/results/allocator_replay.json."""
    timed = json.loads((FOLDER / "allocator_replay.json").read_text(encoding="utf-8"))["allocators"]
    lines = [
        "| runs, each model held out | | allocated replay, fit | reserved replay, fit "
        "| time of a setup replay, fit |",
        "|---|---|---|---|---|",
    ]
    for allocator in ALLOCATORS:
        lines += _both_ways(allocator, timed[allocator]["modes"])
    return "\n".join([*lines, ""])


def _both_ways(allocator: str, timed: dict[str, dict[str, float]]) -> list[str]:
    own = compared(REFERENCE, allocator)
    both = [[run.residual for run in own], [run.fitted for run in own]]
    allocated = [sorted((one.allocated_error for one in found), key=abs) for found in both]
    reserved = [sorted((one.reserved_error for one in found), key=abs) for found in both]

    def pair(figures: Sequence[float], digits: int) -> str:
        return ", ".join(f"{size(one, digits)}%" for one in figures)

    def times(name: str) -> str:
        return ", ".join(f"{float(f'{1000 * mode[name]:.2g}'):g} ms" for mode in timed.values())

    def worst(found: Sequence[Sequence[float]]) -> str:
        return ", ".join(f"{errors[-1]:+.2%}" for errors in found)

    at = min(len(own) - 1, int(0.95 * len(own)))
    middle = [[statistics.median(map(abs, errors)) for errors in found] for found in (allocated, reserved)]
    high = [[errors[at] for errors in found] for found in (allocated, reserved)]
    runs = f"{len(own)} with {ALLOCATOR_WORDS[allocator]}"
    return [
        f"| {runs} | median | {pair(middle[0], 3)} | {pair(middle[1], 2)} | {times('seconds_median')} |",
        f"| | 95th percentile | {pair(high[0], 2)} | {pair(high[1], 1)} | |",
        f"| | worst | {worst(allocated)} | {worst(reserved)} | {times('seconds_longest')} |",
    ]


def shares(old: str) -> str:
    """The interval's terms, with replay and without, by allocator: the reference's, which all GPUs share."""
    return filled(old, lambda label: [cell for allocator in ALLOCATORS for cell in _terms(label, allocator)])


def _terms(label: str, allocator: str) -> list[str]:
    found = calibration(REFERENCE, allocator).coefficients
    match label:
        case "constant":
            return [f"{found.replay_margin_bytes // MIB} MiB", f"{found.margin_bytes // MIB} MiB"]
        case "other card":
            return [f"{found.context_spread_bytes // MIB} MiB"] * 2
        case "f":
            return [f"1 + {found.outside_factor - 1:.2f} n"] * 2
    one = next(one for one in found.kinds if one.kind == KINDS[label])
    count = sum(interval_kind(run.record.setup) == one.kind for run in _of_all_gpus(allocator))
    return [f"{one.replay_margin_blocks:.2f} ({count} runs)", f"{one.margin_fraction:.3f}"]


def held_out(_: str) -> str:
    """What the runs with one thing needed of the interval learned without them, and what needed more than all
    of it with torch's default allocator.
    """
    by_ratio: dict[str, list[HeldOutThing]] = {}
    for thing in calibration(REFERENCE).things:
        key = f"{thing.ratio:.2f}" if thing.ratio >= LISTED_RATIO else ""
        by_ratio.setdefault(key, []).append(thing)
    lines = ["| held out | runs | ratio |", "|---|---|---|"]
    for ratio, found in by_ratio.items():
        names = ", ".join(f"`{one.thing}`" if "=" in one.thing else one.thing for one in found)
        low, high = min(one.runs for one in found), max(one.runs for one in found)
        span = f"{low}" if low == high else f"{low} to {high}"
        most = f"at most {max(one.ratio for one in found):.2f}"
        lines.append(f"| {names if ratio else f'{len(found)} others'} | {span} | {ratio or most} |")
    above = [thing for thing in calibration(REFERENCE, NATIVE).things if thing.ratio > 1]
    named = ", ".join(f"{one.thing} {one.ratio:.2f} ({one.runs} runs)" for one in above)
    return "\n".join([*lines, "", wrapped(f"Above 1 with {ALLOCATOR_WORDS[NATIVE]}: {named or 'none'}.")])


BLOCKS: dict[str, Callable[[str], str]] = {
    "runs": runs,
    "elsewhere": elsewhere,
    "allocators": allocators,
    "knobs": knobs,
    "beyond": beyond,
    "capped": capped,
    "lengths": lengths,
    "processes": processes,
    "replay and fit": replay_and_fit,
    "shares": shares,
    "held out": held_out,
}


def written(text: str) -> str:
    """A page with its blocks as they are now.

    Raises:
        KeyError: a block, or a row that is filled, has a name that nothing here has.
    """

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]](match[3].strip())}\n{match[4]}"

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    print(written(PAGE.read_text(encoding="utf-8")), end="")
