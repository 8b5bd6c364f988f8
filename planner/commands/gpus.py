"""List the GPUs of the catalog, and those of this machine."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from planner.base.errors import ExitCode, InputError, UnknownNameError
from planner.gpus.catalog import gpu_catalog, normalise
from planner.gpus.detect import LocalGpu, NoGpuError, local_gpus
from planner.gpus.spec import GpuSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `gpus`."""
    parser.add_argument("text", nargs="?", help="list cards with this in their name only")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List and print."""
    catalog = gpu_catalog()
    wanted = normalise(args.text) if args.text is not None else ""
    if args.text is not None and not wanted:
        raise InputError("an empty text selects nothing")
    found = [gpu for gpu in catalog if any(wanted in normalise(n) for n in (gpu.id, gpu.name, *gpu.aliases))]
    if not found:
        raise UnknownNameError("GPU", args.text, catalog.suggestions(), "(list them with: vramwise gpus)")
    try:
        here: tuple[LocalGpu, ...] = local_gpus()
        reason = None
    except NoGpuError as error:
        here, reason = (), str(error)
    if args.json:
        json.dump(_json(found, here), sys.stdout, indent=2, allow_nan=False)
        print()
        return ExitCode.OK
    from planner.text.figures import show
    from planner.text.tables import print_gpus, print_local_gpus

    show(lambda out: print_gpus(out, found))
    show(lambda out: print_local_gpus(out, here, reason))
    return ExitCode.OK


def _json(found: list[GpuSpec], here: tuple[LocalGpu, ...]) -> dict[str, Any]:
    from planner.base.json_codec import encode

    return {
        "version": 1,
        "gpus": [encode(gpu) for gpu in found],
        "here": [{**encode(gpu), "free_bytes": gpu.free_bytes} for gpu in here],
    }
