"""Go on with a run that has ended, from its newest whole checkpoint, and follow it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.interrupts import sigterm_as_ctrl_c
from launcher.commands.waiting import see_that_a_run_can_go_on
from planner.base.errors import InputError
from planner.commands.program import StoreOnce, real_number, say, whole_number

if TYPE_CHECKING:
    from launcher.runs.attempts import Attempt
    from launcher.runs.folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `runs resume` takes beside the run."""
    asked = parser.add_argument_group("resume")
    for flag, kind, metavar, text in (
        ("--epochs", real_number, "X", "passes over the data, other than before"),
        ("--max-steps", whole_number, "N", "steps in all, other than before"),
        ("--num-processes", whole_number, "N", "GPUs, other than before; the effective batch is kept"),
        ("--distributed", str, "WAY", "how they share the work, other than before: ddp or fsdp"),
        ("--accept-changes", str, "KINDS", "go on although these changed: data, model, versions"),
    ):
        asked.add_argument(flag, action=StoreOnce, type=kind, metavar=metavar, help=text)
    asked.add_argument(
        "--wait", action="store_true", help="wait for the GPU, and for memory that others hold"
    )


def refuse_arguments(args: argparse.Namespace) -> None:
    """See that nothing is asked of a resumption where none is.

    Raises:
        InputError: something is.
    """
    for name in ("epochs", "max_steps", "num_processes", "distributed", "accept_changes", "wait"):
        if getattr(args, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} is for runs resume")


def run(path: Path, args: argparse.Namespace) -> int:
    """Go on, follow, compare.

    Raises:
        InputError: the run cannot go on, or not like this.
        RunBusyError: it is running.
        GpuBusyError, GpuFullError: its GPU is not free, and nobody wants to wait.
        MissingExtraError: the training stack is not installed.
    """
    from launcher.runs import stack
    from launcher.runs.folder import RunFolder
    from launcher.runs.kept import fingerprint, resumption

    stack.require("runs resume")
    wish = resumption.ResumeWish(
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        num_processes=args.num_processes,
        distributed=args.distributed,
        accepted=tuple(part.strip() for part in (args.accept_changes or "").split(",") if part.strip()),
    )
    folder = RunFolder(path.resolve())
    plan = resumption.prepare(folder, wish)
    with sigterm_as_ctrl_c():
        if see_that_a_run_can_go_on(folder, plan.attempt, wait=args.wait):
            # Meanwhile somebody may have gone on with it, or changed its data.
            plan = resumption.prepare(folder, wish)
    for reason in plan.broken:
        say(f"not a whole checkpoint: {reason}")
    step = plan.attempt.from_step
    say(f"{path.name} goes on after step {step:,}" if step else f"{path.name} begins anew: no checkpoint")
    if plan.attempt.changes:
        say(f"changed: {plan.attempt.changes}")
    try:
        fingerprint.write(folder, plan.fingerprint)
    except OSError as error:
        raise InputError(f"{folder.fingerprint}: cannot be written ({error.strerror})") from error
    return _go_on(folder, plan.attempt)


def _go_on(folder: RunFolder, attempt: Attempt) -> int:
    """Signals are taken from before the start: a run that goes on is followed, or told to end."""
    from launcher.commands.follow import finish, follow_to_the_end
    from launcher.commands.interrupts import Interrupts
    from launcher.runs import supervisor

    with Interrupts() as interrupts:
        handle = supervisor.resume(folder.path, attempt)
        folder, left = follow_to_the_end(folder, interrupts, handle.goes_on, ends_run=True)
    if left is not None:
        return 128 + left
    return finish(folder, supervisor.status(folder.path), out=sys.stdout)
