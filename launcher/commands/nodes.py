"""Options of train for several machines: what torchrun is told, by its own names."""

from __future__ import annotations

import argparse
from typing import Any

from planner.base import validate
from planner.commands.program import StoreOnce, whole_number


def add_nodes(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    group = parser.add_argument_group("several machines", "the same command on each, but for --node-rank")
    for flag, metavar, text in (
        ("--nnodes", "N", "machines that share --num-processes evenly (default: 1)"),
        ("--node-rank", "N", "which of them this is; 0 saves checkpoints and adapter (default: 0)"),
    ):
        group.add_argument(flag, action=StoreOnce, type=whole_number, metavar=metavar, help=text)
    group.add_argument(
        "--rdzv-endpoint", action=StoreOnce, metavar="HOST:PORT", help="where they meet: of --node-rank 0"
    )


def nodes_wish(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked of them, as JobWish has it.

    Raises:
        InputError: no number of machines, or no rank of one.
    """
    nnodes = 1 if args.nnodes is None else args.nnodes
    validate.integer("--nnodes", nnodes, minimum=1, maximum=1024)
    validate.integer("--node-rank", args.node_rank or 0, minimum=0, maximum=nnodes - 1)
    return {
        "nnodes": nnodes,
        "node_rank": args.node_rank or 0,
        "rdzv_endpoint": args.rdzv_endpoint,
    }
