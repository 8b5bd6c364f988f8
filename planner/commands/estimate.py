"""Estimate the memory and speed of given training setups, one a line, or of a trainer's config, on a GPU.

Exit code 0 whether or not a setup fits (3 where a --config does not), 2 when a line is not a setup; the other
lines are still answered.
Up to 200 lines each get a replay of torch's allocator; longer files, and what comes after that on stdin, the
fitted reserve, which is quicker and less exact. `basis` says which.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from planner.base.errors import ExitCode, InputError, VramwiseError, shorten
from planner.base.settings import card_asked_for
from planner.base.values import dataclass
from planner.commands.program import StoreOnce, SwitchOnce
from planner.gpus.target import resolve_gpu
from planner.planning.estimation import Estimate, Estimator
from planner.setup.training_setup import TrainingSetup

MAX_LINE_BYTES = 2**20
STDIN = "-"
MAX_REPLAYED_LINES = 200
"""Lines that are replayed unless asked otherwise: some ten seconds."""


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
    replayed = 0 if args.replay is False else None if args.replay else MAX_REPLAYED_LINES
    if args.setups == STDIN:
        return _answer(_Lines(sys.stdin.buffer, estimator, replayed), args.json, flush=True)
    try:
        with Path(args.setups).open("rb") as file:
            if replayed and _has_more_lines(file, replayed):
                replayed = 0
            return _answer(_Lines(file, estimator, replayed), args.json, flush=False)
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


@dataclass(frozen=True, slots=True)
class _Lines:
    """Setups to answer; the first `replayed` lines (null: all) with the allocator replayed."""

    file: BinaryIO
    estimator: Estimator
    replayed: int | None


def _has_more_lines(file: BinaryIO, limit: int) -> bool:
    """Whether a file has more lines; a pipe, which cannot be read twice, is taken to have none."""
    if not file.seekable():
        return False
    lines = 0
    while lines <= limit and (line := file.readline(MAX_LINE_BYTES + 1)):
        _skip_rest(file, line)
        lines += 1
    file.seek(0)
    return lines > limit


def _answer(lines: _Lines, as_json: bool, *, flush: bool) -> int:
    if as_json:
        return _print_json(lines, flush=flush)
    answers = list(_answers(lines))
    from planner.text.figures import show
    from planner.text.tables import print_estimates

    show(lambda out: print_estimates(out, answers, lines.estimator.target))
    bad = [(number, answer) for number, answer in answers if isinstance(answer, VramwiseError)]
    if bad:
        number, first = bad[0]
        more = f" (and {len(bad) - 1} more bad lines)" if len(bad) > 1 else ""
        raise InputError(f"line {number}: {first}{more}")
    return ExitCode.OK


def _print_json(lines: _Lines, *, flush: bool) -> int:
    encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
    write = sys.stdout.write
    code = ExitCode.OK
    for number, answer in _answers(lines):
        if isinstance(answer, VramwiseError):
            code = ExitCode.BAD_INPUT
            line: dict[str, Any] = {"error": " ".join(str(answer).split()), "line": number}
        else:
            line = answer.to_dict()
        write(encode(line) + "\n")
        if flush:
            sys.stdout.flush()
    return code


def _answers(lines: _Lines) -> Iterator[tuple[int, Estimate | VramwiseError]]:
    """Yield the answer to each line with its number; empty lines have none."""
    file, number = lines.file, 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            _skip_rest(file, line)
            yield number, InputError(f"a line of more than {MAX_LINE_BYTES:,} bytes is no training setup")
            continue
        if not line.strip():
            continue
        replay = lines.replayed is None or number <= lines.replayed
        try:
            setup = TrainingSetup.from_dict(_parse(line))
            answer: Estimate | VramwiseError = lines.estimator.estimate(setup, replay=replay)
        except VramwiseError as error:
            answer = error
        yield number, answer


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"broken JSON at column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"JSON out of bounds: {error}") from error


def _skip_rest(file: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES)
