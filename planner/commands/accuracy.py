"""How right memory and speed are: held-out errors on the committed records."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from planner.base.errors import ExitCode
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from planner.calibration.accuracy import Accuracy, PublishedSpeed, SeveralRun, SpeedAccuracy

_ALLOCATORS = {
    EXPANDABLE: "expandable segments, as the launcher starts runs",
    NATIVE: "torch's default allocator: Windows and WSL, where expandable segments do not work",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `accuracy`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Leave out each model in turn, and print the errors."""
    from planner.calibration.accuracy import (
        accuracy,
        published_accuracy,
        several_gpus,
        several_records,
        shipped_records,
        speed_accuracy,
    )

    records = shipped_records()
    found, speed, several = accuracy(records), speed_accuracy(records), several_gpus(several_records())
    published = published_accuracy()
    if args.json:
        from dataclasses import asdict

        values = {
            "version": 1,
            "gpus": [asdict(one) for one in found],
            "speed": [asdict(one) for one in speed],
            "published": [asdict(one) for one in published],
        }
        if several:
            values["several_gpus"] = [asdict(one) for one in several]
        json.dump(values, sys.stdout, indent=2, allow_nan=False)
        print()
        return ExitCode.OK
    for index, one in enumerate(found):
        print("\n" * (index > 0), end="")
        _print(one)
    if several:
        _print_several(several)
    for one_speed in speed:
        _print_speed(one_speed)
    _print_published(published)
    return ExitCode.OK


def _print_published(found: Sequence[PublishedSpeed]) -> None:
    from planner.text.figures import WIDE, columns, show

    def tables(out: Console) -> None:
        wide = out.width >= WIDE
        out.print("\nTokens a second of runs that others published, none fitted, by class of card\n")
        heads = [("class", "name"), ("median", "number"), ("90th", "number"), ("worst", "number")]
        heads += [("covered", "number")]
        if wide:
            heads += [("bias", "number"), ("sources", "number"), ("cards", "text")]
        rows = []
        for one in found:
            summary, covered = one.summary, f"{one.covered} of {one.summary.runs}"
            rows.append(
                [
                    one.card_class,
                    _tenths(summary.median),
                    _tenths(summary.percentile_90),
                    _signed(summary.worst),
                ]
            )
            rows[-1] += [covered]
            rows[-1] += [_signed(summary.bias), str(one.sources), ", ".join(one.gpus)] if wide else []
        columns(out, heads, rows, indent=0)

    show(tables)


def _print_several(found: Sequence[SeveralRun]) -> None:
    from planner.text.figures import columns, show

    def tables(out: Console) -> None:
        out.print("\nRuns on several GPUs: the rank that is furthest off, none held out\n")
        heads = [("run", "text"), ("allocated", "number"), ("reserved", "number"), ("process", "number")]
        heads += [("tokens/s", "number")]
        rows = [
            [
                f"{one.num_processes} x {one.gpu} {one.distributed}, {one.model} {one.method}",
                *map(_percent, (one.allocated, one.reserved, one.process, one.speed)),
            ]
            for one in found
        ]
        columns(out, heads, rows, indent=0)

    show(tables)


def _print_speed(found: SpeedAccuracy) -> None:
    from planner.text.figures import WIDE, columns, show

    print(f"\n{found.gpu}: tokens a second\n")

    def tables(out: Console) -> None:
        columns(out, *_speed_table(found, wide=out.width >= WIDE), indent=0)
        if found.models:
            out.print("\nThe worst run of each model")
            heads = [("model", "name"), ("worst", "number"), ("bias", "number"), ("runs", "number")]
            rows = [
                [one.model, _signed(one.summary.worst), _signed(one.summary.bias), str(one.summary.runs)]
                for one in found.models
            ]
            columns(out, heads, rows, indent=0)

    show(tables)


def _print(found: Accuracy) -> None:
    from planner.text.figures import WIDE, columns, show

    runs = sum(model.runs for model in found.models)

    def tables(out: Console) -> None:
        wide = out.width >= WIDE
        out.print(f"{found.gpu}, {_ALLOCATORS[found.allocator]}")
        out.print(f"{runs} runs of {len(found.models)} models, each model held out of its fit")
        out.print("Errors are (predicted / measured - 1) in percent.\n")
        heads = [("figure", "name"), ("median", "number"), ("worst", "number")]
        rows = [[one.figure, _size(one.median), _percent(one.worst)] for one in found.overall]
        if wide:
            heads += [("95th", "number"), ("bias", "number"), ("runs", "number")]
            for row, one in zip(rows, found.overall, strict=True):
                row += [_size(one.percentile_95), _percent(one.bias), str(one.runs)]
        columns(out, heads, rows, indent=0)
        out.print("\nThe worst run of each model")
        heads = [("model", "name"), ("allocated", "number"), ("reserved", "number")]
        rows = [
            [model.model, *(_percent(one.worst) for one in model.summaries[:2])] for model in found.models
        ]
        if wide:
            heads += [("process", "number"), ("runs", "number")]
            for row, model in zip(rows, found.models, strict=True):
                row += [_percent(model.summaries[2].worst), str(model.runs)]
        columns(out, heads, rows, indent=0)

    show(tables)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f}"


def _speed_table(found: SpeedAccuracy, *, wide: bool) -> tuple[list[tuple[str, str]], list[list[str]]]:
    heads = [("rates", "name"), ("median", "number"), ("90th", "number"), ("worst", "number")]
    if wide:
        heads += [("bias", "number"), ("runs", "number")]
    rows = []
    for name, one in (
        ("held out", found.held_out),
        ("  GPU-bound", found.gpu_bound),
        ("  host-bound", found.host_bound),
        ("earlier runs", found.earlier),
        ("borrowed", found.borrowed),
    ):
        if one is not None:
            rows.append([name, _tenths(one.median), _tenths(one.percentile_90), _signed(one.worst)])
            rows[-1] += [_signed(one.bias), str(one.runs)] if wide else []
    return heads, rows


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _tenths(value: float) -> str:
    return f"{100 * value:.1f}"


def _size(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
