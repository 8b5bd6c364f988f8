"""Merge a trained adapter into its base: one 16-bit model that every server loads.

An adapter that was trained on a base in 4 bits (QLoRA) is merged into that base dequantised and into the
original weights; both are measured on the run's own examples beside the adapter as it was trained, and the
better one is kept. Nothing is left behind where it is interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.runs import stack
from planner.base.errors import ExitCode, FieldError
from planner.commands.program import StoreOnce, real_number, say

if TYPE_CHECKING:
    from launcher.merging.merge import Merge
    from launcher.merging.needs import Needs
    from launcher.merging.task import MergeTask

SHARD_SIZE = "4GB"
_SIZES = {"MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.usage = "%(prog)s RUN_OR_ADAPTER_FOLDER [OPTIONS]"
    parser.add_argument(
        "folder", type=Path, metavar="RUN_OR_ADAPTER_FOLDER", help="a run, or an adapter of PEFT's"
    )
    parser.add_argument(
        "-o", "--output", action=StoreOnce, type=Path, metavar="DIR", help="where it goes (RUN/merged)"
    )
    parser.add_argument(
        "--model", action=StoreOnce, help="folder or Hub id of the base (default: as trained)"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="one more adapter, added to it",
    )
    parser.add_argument(
        "--weight",
        action="append",
        type=real_number,
        default=[],
        metavar="X",
        help="factor of each adapter in order (1)",
    )
    parser.add_argument(
        "--base",
        action=StoreOnce,
        choices=("dequantised", "original"),
        help="what it is added to (default: what measures better)",
    )
    parser.add_argument("--data", action=StoreOnce, type=Path, metavar="FILE", help="examples to measure on")
    parser.add_argument("--no-measure", action="store_true", help="merge without measuring")
    parser.add_argument(
        "--max-shard-size", action=StoreOnce, metavar="SIZE", help=f"of a file ({SHARD_SIZE})"
    )
    parser.add_argument("--allow-download", action="store_true", help="the base may be fetched from the Hub")


def run(args: argparse.Namespace) -> int:
    """Read, say what is needed, merge, measure, and tell how to serve it.

    Raises:
        InputError: there is nothing to merge, a merge would lose what was learned, or room is lacking.
        MissingExtraError: the training stack is not installed.
    """
    stack.require("merge")
    shard_bytes = _size(args.max_shard_size or SHARD_SIZE)
    _quiet(allow_download=args.allow_download)
    task = _task(args)
    merge = _prepared(task, shard_bytes, allow_download=args.allow_download)

    import torch

    from launcher.merging.needs import refuse_too_little

    needs = merge.needs()
    on_gpu = (
        torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needs.trained_bytes + needs.answers_bytes
    )
    _say_needs(needs, on_gpu=on_gpu)
    refuse_too_little(needs, task.output, on_gpu=on_gpu)
    from launcher.commands.merge_report import MergeProgress, print_merged
    from planner.text.figures import show

    with MergeProgress() as progress:
        merged = merge.run(torch.device("cuda", 0) if on_gpu else torch.device("cpu"), needs, progress)
    show(lambda out: print_merged(out, merge, merged))
    return ExitCode.OK


def _task(args: argparse.Namespace) -> MergeTask:
    from launcher.merging.task import MergeWish, read_task

    return read_task(
        MergeWish(
            folder=args.folder,
            output=args.output,
            model=args.model,
            adapters=tuple(args.adapter),
            weights=tuple(args.weight),
            base=args.base,
            data=args.data,
            measured=not args.no_measure,
        )
    )


def _prepared(task: MergeTask, shard_bytes: int, *, allow_download: bool) -> Merge:
    from launcher.merging.adapters import Adapters
    from launcher.merging.measuring import measured_rows
    from launcher.merging.merge import Merge
    from launcher.merging.task import for_base
    from launcher.training.loading.base_folder import find_base

    base = find_base(task.source, allow_download=allow_download)
    task = for_base(task, base)
    for one in task.adapters:
        if one.base and one.base != task.source:
            say(f"note: {one.path} was trained on {one.base}, and is merged into {task.source}")
    adapters = Adapters(task.adapters, task.weights).attach(base)
    rows = [] if task.data is None else measured_rows(task, base, allow_download=allow_download)
    return Merge(task=task, base=base, adapters=adapters, rows=rows, shard_bytes=shard_bytes)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)(MB|GB)", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _SIZES[found[2].upper()]) if found else 0
    if size < _SIZES["MB"]:
        raise FieldError("--max-shard-size", text, "a size such as 500MB or 4GB")
    return size


def _quiet(*, allow_download: bool) -> None:
    """Keep libraries off the network unless asked, and their notes to authors off the terminal."""
    if not allow_download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _say_needs(needs: Needs, *, on_gpu: bool) -> None:
    from planner.text.figures import gib

    memory = needs.writing_bytes if on_gpu else needs.host_bytes
    more = (
        ""
        if on_gpu or needs.roomy_bytes <= memory
        else f" (takes {gib(needs.roomy_bytes)} where they are free)"
    )
    say(f"needs {gib(memory)} of host memory{more} and {gib(needs.disk_bytes)} of disk")
