"""Check that setups still fit a card: trainers' configs, plans or setups of this program, a verdict a line.

For a pre-commit hook and for CI. Reads YAML of Axolotl, LLaMA-Factory and trl sft, and JSON of a plan or a
training setup. Exit code 3 where one does not fit, 2 where one cannot be read; all are looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from planner.base.errors import ExitCode, InputError, VramwiseError, shorten
from planner.base.settings import card_asked_for
from planner.base.values import dataclass
from planner.commands.program import StoreOnce, say
from planner.gpus.target import GpuTarget, resolve_gpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `check-setup`."""
    parser.usage = "%(prog)s FILE... --gpu GPU [OPTIONS]"
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a config, a plan or a setup")
    parser.add_argument(
        "--gpu", action=StoreOnce, help="24GB, rtx-4090, 2x24GB ... (default: this machine's)"
    )
    parser.add_argument(
        "--trainer", action=StoreOnce, help="whose config: axolotl, llamafactory, trl (default: seen)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--allow-download",
        action="store_true",
        help="the config of a model that is not on this machine may be fetched from the Hugging Face Hub",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """Whether a file's setup fits, and the reason in words; of what cannot be read `fits` is null."""

    file: str
    fits: bool | None
    reason: str


def run(args: argparse.Namespace) -> int:
    """Look at every file and print its verdict."""
    gpu, display, _ = card_asked_for(args.gpu, display=False, price_per_hour=None)
    target = resolve_gpu(gpu, display=display)
    verdicts = [_verdict(path, target, args) for path in args.files]
    if args.json:
        from planner.base.json_codec import encode

        json.dump({"version": 1, "files": [encode(one) for one in verdicts]}, sys.stdout, indent=2)
        print()
    else:
        for one in verdicts:
            if one.fits is not None:
                print(f"{one.file}: {'fits' if one.fits else 'does not fit'}: {one.reason}")
    for one in verdicts:
        if one.fits is None:
            say(f"{one.file}: {one.reason}")
    if any(one.fits is None for one in verdicts):
        return ExitCode.BAD_INPUT
    return ExitCode.OK if all(one.fits for one in verdicts) else ExitCode.DOES_NOT_FIT


def _verdict(path: Path, target: GpuTarget, args: argparse.Namespace) -> _Verdict:
    try:
        fits, peak, usable, told = _looked_at(path, target, args)
    except VramwiseError as error:
        return _Verdict(file=str(path), fits=None, reason=" ".join(str(error).split()))
    reason = f"at most {peak / 2**30:.2f} of {usable / 2**30:.2f} GiB on {target.text.strip()}{told}"
    return _Verdict(file=str(path), fits=fits, reason=reason)


def _looked_at(path: Path, target: GpuTarget, args: argparse.Namespace) -> tuple[bool, int, int, str]:
    """Whether it fits, what it needs at most and what the card leaves, and what would make it fit."""
    inspector = getattr(args, "inspector", None)
    if path.suffix.lower() == ".json":
        from planner.planning.estimation import Estimator
        from planner.setup.training_setup import TrainingSetup

        setup = TrainingSetup.from_dict(_setup_of(path))
        found = Estimator(target, allow_network=args.allow_download, inspector=inspector).estimate(setup)
        return found.fits, found.memory.peak_upper_bytes, target.usable_bytes, ""
    from planner.trainers.answer import answer

    answered = answer(
        path, target, trainer=args.trainer, allow_network=args.allow_download, inspector=inspector
    )
    needed = answered.estimate.memory.peak_upper_bytes
    told = "".join(
        f"; {', '.join(f'{key}: {value}' for key, value in change.settings)}" for change in answered.changes
    )
    if told:
        told = (
            "; what would help"
            + (", all together" if len(answered.changes) > 1 else "")
            + told.replace(";", ":", 1)
        )
    return answered.estimate.fits, needed, target.usable_bytes, told


def _setup_of(path: Path) -> Any:
    """The setup of a JSON file: a plan's, or the whole of it.

    Raises:
        InputError: it cannot be read.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"is no JSON: {shorten(str(error))}") from error
    return values["setup"] if isinstance(values, dict) and "setup" in values else values
