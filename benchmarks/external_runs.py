"""Forecasts beside runs that others published: `python -m benchmarks.external_runs [--groups]`.

Reads profiles/external_runs.jsonl by planner/calibration/published.py; none is fitted. Prints the tables of
docs/throughput.md, or with `--groups` the errors by what the runs have in common.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence

from planner.calibration.accuracy import published_accuracy
from planner.calibration.published import (
    InexpressibleError,
    PublishedRun,
    published_runs,
    rows,
    setup_of,
)
from planner.gpus.card_class import card_class
from planner.setup.training_setup import TrainingSetup

__all__ = ["InexpressibleError", "PublishedRun", "published_runs", "rows", "setup_of", "table"]


def table() -> str:
    """The table of docs/throughput.md and what it leaves out, as Markdown."""
    found, left_out = published_runs()
    lines = [
        "| GPU | model | method | kernels and loss | batch | measured | forecast | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(found, key=_order):
        setup = run.setup
        batch = f"{setup.per_device_train_batch_size} x {setup.max_length:,}"
        gpu = run.gpu.id if setup.num_processes == 1 else f"{setup.num_processes} x {run.gpu.id}"
        cells = (gpu, setup.model, _method(setup), f"{run.framework}: {_short(run)}", batch)
        numbers = f"{run.measured:,.0f} | {run.forecast:,.0f} | {run.error:+.0%}"
        lines.append(f"| {' | '.join(cells)} | {numbers} |")
    summary = f"Of {len(rows())} published runs {sum(left_out.values())} are left out: " + "; ".join(
        f"{count} {reason}" for reason, count in left_out.most_common()
    )
    return "\n".join(["", *_by_class(), "", *lines, "", *_wrapped(summary + "."), ""])


def _by_class() -> list[str]:
    """The rows of `vramwise accuracy` by class of card, as Markdown."""
    lines = [
        "| class | cards | sources | runs | median | 90th percentile | bias | in their interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in published_accuracy():
        errors = one.summary
        lines.append(
            f"| {one.card_class} | {', '.join(one.gpus)} | {one.sources} | {errors.runs} | "
            f"{errors.median:.0%} | {errors.percentile_90:.0%} | {errors.bias:+.0%} | {one.covered} |"
        )
    return lines


def _order(run: PublishedRun) -> tuple[object, ...]:
    setup = run.setup
    return (
        run.gpu.id,
        setup.model,
        setup.method,
        run.losses,
        setup.per_device_train_batch_size,
        -run.measured,
    )


def _method(setup: TrainingSetup) -> str:
    kinds = [setup.method + ("" if setup.method == "full" else f" r{setup.lora_r}")]
    kinds += ["compiled"] if setup.compile != "none" else []
    kinds += ["not checkpointed"] if not setup.gradient_checkpointing else []
    kinds += ["offloaded"] if setup.activation_offloading else []
    return ", ".join(kinds)


def _short(run: PublishedRun) -> str:
    if not run.losses.startswith("foak"):
        return "chunked loss" if "Chunked" in run.losses else "full logits"
    return "fused, " + ("fused linear loss" if "Liger" in run.losses else "full logits")


def _summary(runs: Sequence[PublishedRun]) -> str:
    errors = [run.error for run in runs]
    sizes = sorted(map(abs, errors))
    return (
        f"median error {statistics.median(sizes):.0%}, 90th percentile {sizes[int(0.9 * len(sizes))]:.0%}, "
        f"bias {statistics.fmean(errors):+.0%}"
    )


def _wrapped(text: str) -> Iterable[str]:
    import textwrap

    return textwrap.wrap(text, 118)


GROUPS: dict[str, Callable[[PublishedRun], object]] = {
    "GPU": lambda run: run.gpu.id,
    "class": lambda run: card_class(run.gpu),
    "source": lambda run: run.source,
    "framework": lambda run: run.framework,
    "method": lambda run: run.setup.method,
    "loss": lambda run: _short(run),
    "model": lambda run: run.setup.model,
    "batch": lambda run: run.setup.per_device_train_batch_size,
    "compiled": lambda run: run.setup.compile,
    "method and loss": lambda run: (run.setup.method, _short(run)),
}


def groups() -> str:
    """Errors by what runs have in common."""
    found, _ = published_runs()
    lines = []
    for name, key in GROUPS.items():
        by: dict[object, list[PublishedRun]] = {}
        for run in found:
            by.setdefault(key(run), []).append(run)
        lines += [f"{name} {value}: {len(runs)} runs, {_summary(runs)}" for value, runs in by.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(groups() if "--groups" in sys.argv[1:] else table())
