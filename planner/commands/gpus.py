"""List the GPUs of the catalog, and those of this machine."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from planner.base.errors import ExitCode, InputError, UnknownNameError
from planner.gpus.catalog import GpuCatalog, gpu_catalog, normalise
from planner.gpus.detect import LocalGpu, NoGpuError, local_gpus
from planner.gpus.parse import REFERENCE_CARDS, accepted_sizes
from planner.gpus.spec import GpuSpec

_SIZE = re.compile(r"\s*(\d{1,4})\s*(?:gib|gb|g)\s*", re.IGNORECASE)
# Where a card checks its memory (ECC), a sixteenth of what is on its label holds the check bits (T4, A40).
_LEAST_OF_LABEL, _MOST_OF_LABEL = 0.935, 1.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `gpus`."""
    parser.add_argument("text", nargs="?", help="only cards with this in their name, or of this memory: 24gb")
    parser.add_argument(
        "--update-prices",
        action="store_true",
        help="download what gpuhunt lists of rented cards' prices first, and keep it for plans",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List and print."""
    if args.update_prices:
        _update_prices()
    catalog = gpu_catalog()
    found = list(catalog) if args.text is None else _selected(args.text, catalog)
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


def _update_prices() -> None:
    """Download and keep prices, and say on stderr whose they are and where they lie."""
    import datetime as dt

    from planner.gpus.price_list import download_prices
    from planner.gpus.prices import keep_prices

    prices = download_prices(dt.datetime.now(dt.UTC).date())
    path = keep_prices(prices)
    gpu_catalog.cache_clear()
    providers = ", ".join(sorted({one.provider for one in prices}))
    days = sorted({one.listed for one in prices})
    told = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    print(
        f"{len(prices)} prices of {told} ({providers}; {prices[0].by}) are in {path}; "
        "remove it for those that were shipped",
        file=sys.stderr,
    )


def _selected(text: str, catalog: GpuCatalog) -> list[GpuSpec]:
    """Cards with the text in their name, or of the memory that it says."""
    wanted = normalise(text)
    if not wanted:
        raise InputError("an empty text selects nothing")
    size = _SIZE.fullmatch(text)
    if size is not None:
        if int(size[1]) not in REFERENCE_CARDS:
            raise InputError(f"no card of the catalog has {size[1]} GB; the sizes are {accepted_sizes()}")
        label = int(size[1]) * 2**30
        return [
            gpu for gpu in catalog if _LEAST_OF_LABEL * label < gpu.memory_bytes <= _MOST_OF_LABEL * label
        ]
    found = [gpu for gpu in catalog if any(wanted in normalise(n) for n in (gpu.id, gpu.name, *gpu.aliases))]
    if not found:
        raise UnknownNameError("GPU", text, catalog.suggestions(), "(list them with: vramwise gpus)")
    return found


def _json(found: list[GpuSpec], here: tuple[LocalGpu, ...]) -> dict[str, Any]:
    from planner.base.json_codec import encode

    return {
        "version": 1,
        "gpus": [encode(gpu) for gpu in found],
        "here": [{**encode(gpu), "free_bytes": gpu.free_bytes} for gpu in here],
    }
