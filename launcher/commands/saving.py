"""How checkpoints are asked for on the command line, and what comes of it in words."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from planner.answers.plan import Plan
from planner.base.errors import InputError
from planner.commands.program import StoreOnce, real_number, whole_number
from planner.setup.defaults import KEPT_CHECKPOINTS, SAVE_MINUTES

if TYPE_CHECKING:
    from launcher.runs.job import JobWish


def add_saving(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    usual = f"(default: every {SAVE_MINUTES:g} minutes and at each epoch's end)"
    for flag, kind, metavar, text in (
        ("--save-steps", whole_number, "N", f"save a checkpoint every N steps {usual}"),
        ("--save-minutes", real_number, "M", "save one M minutes after the last, and at each epoch's end"),
        ("--keep-checkpoints", whole_number, "N", f"keep the newest N ({KEPT_CHECKPOINTS})"),
    ):
        parser.add_argument(flag, action=StoreOnce, type=kind, metavar=metavar, help=text)
    parser.add_argument("--no-checkpoints", action="store_true", help="save the result alone, as 0 above")


def saving_wish(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of JobWish that say when checkpoints are saved.

    Raises:
        InputError: none are wanted, and some are.
    """
    off = args.no_checkpoints or 0 in (args.save_steps, args.save_minutes)
    asked = args.save_steps or args.save_minutes or args.keep_checkpoints
    if off and asked:
        raise InputError(
            "no checkpoints are wanted (--no-checkpoints, or 0), and how they are saved is given"
        )
    if off:
        return {"checkpoints": False}
    kept = KEPT_CHECKPOINTS if args.keep_checkpoints is None else args.keep_checkpoints
    return {
        "save_steps": args.save_steps,
        "save_minutes": args.save_minutes,
        "keep_checkpoints": kept,
    }


def saving_in_words(wish: JobWish, plan: Plan) -> str:
    """How often a checkpoint is saved, how many are kept, how large."""
    if not wish.checkpoints:
        return "no checkpoints: what ends this run before its end loses all of it"
    minutes = wish.save_minutes
    if minutes is None and wish.save_steps is None:
        minutes = SAVE_MINUTES
    times = [] if wish.save_steps is None else [f"every {wish.save_steps:,} steps"]
    if minutes is not None:
        times.append(f"every {minutes:g} minutes and at each epoch's end")
    size = plan.loading.checkpoint_bytes / 2**20
    return (
        f"checkpoints: {' and '.join(times)}, the newest {wish.keep_checkpoints} kept in the run folder, "
        f"{size:,.0f} MiB each at most"
    )
