"""How right the memory model is: held-out errors on the committed records."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from planner.errors import ExitCode

if TYPE_CHECKING:
    from planner.accuracy import Accuracy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `accuracy`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Leave out each model in turn, and print the errors."""
    from planner.accuracy import accuracy, shipped_records

    found = accuracy(shipped_records())
    if args.json:
        from dataclasses import asdict

        json.dump(
            {"version": 1, "gpus": [asdict(one) for one in found]}, sys.stdout, indent=2, allow_nan=False
        )
        print()
        return ExitCode.OK
    for one in found:
        _print(one)
    return ExitCode.OK


def _print(found: Accuracy) -> None:
    from planner.render import columns, show

    runs = sum(model.runs for model in found.models)
    print(f"{found.gpu}: {runs} runs of {len(found.models)} models, each model held out of its fit")
    print("Errors are (predicted / measured - 1) in percent.\n")
    summary = [
        [
            one.figure,
            str(one.runs),
            _percent(one.bias),
            _size(one.median),
            _size(one.percentile_95),
            _percent(one.worst),
        ]
        for one in found.overall
    ]
    heads = [("figure", "name"), *((name, "number") for name in ("runs", "bias", "median", "95th", "worst"))]
    show(lambda out: columns(out, heads, summary, indent=0))
    print("\nThe worst run of each model")
    rows = [
        [model.model, str(model.runs), *(_percent(one.worst) for one in model.summaries)]
        for model in found.models
    ]
    heads = [
        ("model", "name"),
        ("runs", "number"),
        ("allocated", "number"),
        ("reserved", "number"),
        ("process", "number"),
    ]
    show(lambda out: columns(out, heads, rows, indent=0))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f}"


def _size(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
