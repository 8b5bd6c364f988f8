"""Train the demo model that ships with vramwise, as `vramwise train` would, and ask it before and after.

Takes about half a minute on a CPU; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.runs_folder import add_runs_option, runs_root
from planner.base.data_files import PROFILES
from planner.base.errors import ExitCode
from planner.commands.program import Parser, StoreOnce

if TYPE_CHECKING:
    from rich.console import Console

DEMO = PROFILES / "demo"
# A model of 2.5M parameters learns at a rate that would ruin a large one.
SETTINGS = (
    "--per-device-train-batch-size=8",
    "--gradient-accumulation-steps=1",
    "--learning-rate=3e-3",
    "--epochs=3",
    "--eval-steps=40",
    "--assistant-only-loss",
)
# None is in the training data but the last.
QUESTIONS = ("What are 6 kilometres in metres?", "Hello, I am Emil.", "What is the opposite of early?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "--gpu", action=StoreOnce, help="card to plan for (default: the GPU of this machine, else 16GB)"
    )
    add_runs_option(parser)
    parser.add_argument("--full", action="store_true", help="print all that is known of the plan")


def run(args: argparse.Namespace) -> int:
    """Train, then show answers before and after.

    Raises:
        MissingExtraError: the training stack is not installed.
    """
    from launcher.commands import train

    name = time.strftime("demo-%Y%m%d-%H%M%S")
    code = train.run(_training_arguments(args, name))
    adapter = runs_root(args.runs) / name / "adapter"
    if code != ExitCode.OK or not adapter.is_dir():
        return code
    _show_answers(adapter)
    return code


def _training_arguments(args: argparse.Namespace, name: str) -> argparse.Namespace:
    from launcher.commands import train

    parser = Parser(prog="vramwise demo")
    train.add_arguments(parser)
    asked = [
        f"--model={DEMO / 'model'}",
        f"--data={DEMO / 'data' / 'train.jsonl'}",
        f"--eval-data={DEMO / 'data' / 'eval.jsonl'}",
        f"--runs={runs_root(args.runs)}",
        f"--name={name}",
        *SETTINGS,
        *_for_this_processor(),
    ]
    if args.gpu is not None:
        asked.append(f"--gpu={args.gpu}")
    if args.full:
        asked.append("--full")
    return parser.parse_args(asked, argparse.Namespace(inspector=args.inspector))


def _for_this_processor() -> tuple[str, ...]:
    """Without a GPU and without units for bfloat16 the demo would take an hour."""
    import torch

    from launcher.training.card import multiplies_bfloat16

    if torch.cuda.is_available() or multiplies_bfloat16(torch.device("cpu")):
        return ()
    return ("--dtype=float32",)


def _show_answers(adapter: Path) -> None:
    from launcher.demo.answers import compare_answers
    from planner.text.figures import footnote, heading, pairs, show

    answers = compare_answers(DEMO / "model", adapter, QUESTIONS)

    def write(out: Console) -> None:
        heading(out, "What it learned")
        for one in answers:
            pairs(out, [("asked", one.question), ("before", one.before), ("after", one.after)])
        out.print()
        footnote(out, "A model this small learns the manner of the data; its facts often stay wrong.")

    show(write)
