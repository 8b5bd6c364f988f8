"""Measure this GPU with runs of published shapes, and plan by what it shows."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from launcher.runs import stack
from planner.base import validate
from planner.base.errors import ExitCode, InputError
from planner.commands.program import say
from planner.gpus.detect import LocalGpu, NoGpuError, local_gpus

if TYPE_CHECKING:
    from launcher.measuring.calibrate import Progress
    from planner.calibration.memory_fit import Calibration
    from planner.calibration.speed_fit import SpeedFit

MAX_MINUTES = 24 * 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--minutes", type=float, default=5.0, help="time to spend on measuring (5)")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured here before")
    parser.add_argument("--json", action="store_true", help="print coefficients and residuals as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, fit, keep, and show the residuals.

    Raises:
        InputError: no GPU, minutes out of range, or nothing that fits.
        MissingExtraError: the training stack is not installed.
    """
    minutes = validate.number("minutes", args.minutes, minimum=0.1, maximum=MAX_MINUTES)
    try:
        gpu = local_gpus()[0]
    except NoGpuError as error:
        raise InputError(
            f"calibrate measures a GPU of this machine, and there is none ({error.reason})"
        ) from error
    stack.require("calibrate")
    from launcher.measuring.calibrate import (
        coefficients_file,
        fit,
        fit_speed,
        measure,
        rates_file,
        records_file,
    )

    say(f"{gpu.spec.name}: measuring for up to {minutes:g} min; Ctrl-C keeps what was measured")
    try:
        recorded = measure(gpu, minutes, _report, again=args.again)
        say(f"{recorded} runs recorded in {records_file(gpu)}")
    except KeyboardInterrupt:
        say("interrupted; fitting what was measured")
    found = fit(gpu)
    say(f"coefficients kept in {coefficients_file(gpu)}")
    speed = fit_speed(gpu)
    if speed is not None:
        say(f"throughput rates kept in {rates_file(gpu)}")
    if args.json:
        values = {
            "version": 1,
            "coefficients": found.coefficients.to_dict(),
            "residuals": [asdict(residual) for residual in found.residuals],
            "rates": None if speed is None else speed.rates.to_dict(),
        }
        json.dump(values, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        _show(gpu, found)
        _show_speed(speed)
    return ExitCode.OK


def _show_speed(speed: SpeedFit | None) -> None:
    from planner.calibration.speed_fit import telling

    if speed is None:
        print("speed: too few timed runs to fit rates; forecasts use those of another GPU, scaled")
        return
    runs = len(speed.rates.record_ids)
    errors = sorted(abs(residual.error) for residual in telling(speed.residuals))
    told = f"median error {100 * errors[len(errors) // 2]:.1f}% on models left out" if errors else "one model"
    print(f"speed: rates fitted to {runs} runs; {told}")


def _report(progress: Progress) -> None:
    say(f"[{progress.ended}/{progress.total}] {progress.text}")


def _show(gpu: LocalGpu, found: Calibration) -> None:
    from planner.text.figures import columns, show

    coefficients = found.coefficients
    rows = [
        [
            residual.model,
            f"{100 * residual.allocated_error:+.2f}",
            f"{100 * residual.reserved_error:+.2f}",
            "" if residual.process_error is None else f"{100 * residual.process_error:+.2f}",
        ]
        for residual in found.residuals
    ]
    heads = [
        ("each run, its model left out", "name"),
        ("allocated %", "number"),
        ("reserved %", "number"),
        ("process %", "number"),
    ]
    print(
        f"{gpu.spec.id}: context {coefficients.context_bytes / 2**20:.0f} MiB; "
        f"{len(coefficients.record_ids)} runs of {len(coefficients.model_ids)} models"
    )
    show(lambda out: columns(out, heads, rows, indent=0))
