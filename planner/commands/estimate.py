"""Estimate the memory and speed of given training setups, one a line, or of a trainer's config, on a GPU.

Exit code 0 whether or not a setup fits (3 where a --config does not), 2 when a line is not a setup; the other
lines are still answered.
Up to 200 lines each get a replay of torch's allocator; longer files, and what comes after that on stdin, the
fitted reserve, which is quicker and less exact. `basis` says which. On Linux the lines of a file are shared
out among the cores that this process may use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from planner.base.errors import ExitCode, InputError, VramwiseError, shorten
from planner.base.json_codec import encode_text
from planner.base.settings import card_asked_for
from planner.commands.program import StoreOnce, SwitchOnce
from planner.commands.setup_lines import MAX_REPLAYED_LINES, Answer, Answering, SetupFile, numbered_lines
from planner.gpus.target import GpuTarget, resolve_gpu
from planner.planning.estimation import Estimator

STDIN = "-"
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `estimate`."""
    parser.add_argument(
        "--gpu", action=StoreOnce, help="16GB, rtx-4090, 2x24GB ... (default: the GPU of this machine)"
    )
    parser.add_argument(
        "--setups",
        action=StoreOnce,
        metavar="FILE.jsonl",
        help="training setups, one JSON object a line; - for stdin",
    )
    parser.add_argument(
        "--config",
        action=StoreOnce,
        type=Path,
        metavar="FILE",
        help="a config of Axolotl, LLaMA-Factory or trl sft, or a script of Unsloth's: what it needs there",
    )
    parser.add_argument(
        "--trainer",
        action=StoreOnce,
        help="whose config it is: axolotl, llamafactory, trl, unsloth (default: seen)",
    )
    parser.add_argument(
        "--accelerate", action=StoreOnce, type=Path, metavar="FILE", help="accelerate's file beside --config"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line for each setup")
    parser.add_argument(
        "--replay",
        action=SwitchOnce,
        default=None,
        help=f"replay torch's allocator for each setup (default: up to {MAX_REPLAYED_LINES} setups)",
    )
    parser.add_argument("--display", action="store_true", help="a display is attached to the GPU")
    parser.add_argument(
        "--allow-download",
        action="store_true",
        help="the config of a model that is not on this machine may be fetched from the Hugging Face Hub",
    )


def run(args: argparse.Namespace) -> int:
    """Answer line by line, in order; or a trainer's config."""
    if (args.setups is None) == (args.config is None):
        raise InputError("estimate needs either --setups or --config")
    args.gpu, args.display, _ = card_asked_for(args.gpu, display=args.display, price_per_hour=None)
    if args.config is not None:
        return _answer_config(args)
    estimator = Estimator(
        resolve_gpu(args.gpu, display=args.display),
        allow_network=args.allow_download,
        inspector=getattr(args, "inspector", None),
    )
    if args.setups == STDIN:
        return _answer(args, _as_they_come(sys.stdin.buffer, estimator, args.replay), estimator.target)
    path = Path(args.setups)
    try:
        file = SetupFile.of(path, estimator, replay=args.replay)
        if file is not None:
            return _answer(args, file.answered, estimator.target)
        with path.open("rb") as lines:
            return _answer(args, _as_they_come(lines, estimator, args.replay), estimator.target)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"--setups {shorten(args.setups)}: {error.strerror or error}") from error


def _answer_config(args: argparse.Namespace) -> int:
    from planner.trainers.answer import answer

    found = answer(
        args.config,
        resolve_gpu(args.gpu, display=args.display),
        trainer=args.trainer,
        accelerate=args.accelerate,
        allow_network=args.allow_download,
        inspector=getattr(args, "inspector", None),
    )
    if args.json:
        print(json.dumps(found.to_dict(), allow_nan=False, ensure_ascii=False))
    else:
        from planner.text.figures import show
        from planner.text.trainers import print_config

        show(lambda out: print_config(out, found))
    return ExitCode.OK if found.estimate.fits else ExitCode.DOES_NOT_FIT


class _Answered(Protocol):
    """What answers lines piece by piece: it yields what is made of each piece's answers, in order."""

    def __call__(self, told: Callable[[Iterator[tuple[int, Answer]]], T], /) -> Iterator[T]:
        """Answer them."""


def _as_they_come(file: BinaryIO, estimator: Estimator, replay: bool | None) -> _Answered:
    """Lines that may still be written, each a piece of its own."""
    answering = Answering(estimator, 0 if replay is False else None if replay else MAX_REPLAYED_LINES)

    def answered(told: Callable[[Iterator[tuple[int, Answer]]], T]) -> Iterator[T]:
        return (told(iter((one,))) for one in answering.answers(numbered_lines(file)))

    return answered


def _answer(args: argparse.Namespace, answered: _Answered, target: GpuTarget) -> int:
    if args.json:
        return _print_json(answered(_encoded))
    answers = [one for piece in answered(list) for one in piece]
    from planner.text.figures import show
    from planner.text.tables import print_estimates

    show(lambda out: print_estimates(out, answers, target))
    bad = [(number, answer) for number, answer in answers if isinstance(answer, VramwiseError)]
    if bad:
        number, first = bad[0]
        more = f" (and {len(bad) - 1} more bad lines)" if len(bad) > 1 else ""
        raise InputError(f"line {number}: {first}{more}")
    return ExitCode.OK


def _print_json(pieces: Iterator[tuple[str, bool]]) -> int:
    code = ExitCode.OK
    for text, all_setups in pieces:
        if not all_setups:
            code = ExitCode.BAD_INPUT
        sys.stdout.write(text)
        # Whoever waits for an answer gets it.
        sys.stdout.flush()
    return code


def _encoded(answers: Iterator[tuple[int, Answer]]) -> tuple[str, bool]:
    """Answers as JSON lines, and whether each line was a setup."""
    lines, all_setups = [], True
    for number, answer in answers:
        if isinstance(answer, VramwiseError):
            all_setups = False
            line = encode_text({"error": " ".join(str(answer).split()), "line": number})
        else:
            line = answer.to_json()
        lines.append(line + "\n")
    return "".join(lines), all_setups
