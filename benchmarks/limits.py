"""Whether limits and rows are those of `plan`, for random pairs of a model and a card.

    python -m benchmarks.limits [--pairs N] [--seed S] [--rows N] [--rows-seed S]

For each pair: a plan at the longest length that is said to fit must fit, and one for 512 tokens more must
not, unless that is beyond the model's window. For each of as many pairs as --rows says, with a random method
and at times a fixed length and a display: every row of the whole plan that names a command (advice, methods,
other cards, smallest cards) must be what that command answers, its memory within 0.01 GiB, its speed within
1%, with the same verdict. Writes benchmarks/results/limits.json.
"""

from __future__ import annotations

import argparse
import random
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.results import write_result
from planner.answers.plan import Plan
from planner.commands.plan import add_arguments, request_from
from planner.commands.program import Parser
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import list_models, load_shipped
from planner.planning.make_plan import make_plan
from planner.setup.request import PlanRequest, make_request

STEP = 512
MEMORY_BYTES, SPEED_SHARE = 0.01 * 2**30, 0.01
METHODS = ((), ("--method", "lora"), ("--method", "full"))
OTHERS = ((), (), ("--max-length", "8192"), ("--display",), ("--compile", "none"), ("--lora-r", "64"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a plan: what to type for it, what to leave out, and its figures; without bytes, no more than a
    verdict is told, at a length or at any.
    """

    name: str
    flags: str
    without: tuple[str, ...] = ()
    fits: bool
    peak_upper_bytes: int | None = None
    tokens_per_second: float | None = None
    max_length: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rows", type=int, default=10)
    for name in ("--seed", "--rows-seed"):
        parser.add_argument(name, type=int, default=random.SystemRandom().randrange(2**31))
    arguments = parser.parse_args()
    chosen = random.Random(arguments.seed)
    models, cards = list_models(), list(gpu_catalog())
    pairs = [judge(chosen.choice(models).id, chosen.choice(cards).id) for _ in range(arguments.pairs)]
    asked = random.Random(arguments.rows_seed)
    rows = [judge_rows(random_words(asked)) for _ in range(arguments.rows)]
    wrong = [pair for pair in pairs if not pair["holds"]]
    wrong_rows = [row for one in rows for row in one["wrong"]]
    write_result(
        "limits",
        {
            "seed": arguments.seed,
            "wrong": len(wrong),
            "pairs": pairs,
            "rows_seed": arguments.rows_seed,
            "wrong_rows": len(wrong_rows),
            "rows": rows,
        },
    )
    print(f"seed {arguments.seed}: {len(pairs) - len(wrong)} of {len(pairs)} pairs hold")
    total = sum(one["rows"] for one in rows)
    print(f"seed {arguments.rows_seed}: {total - len(wrong_rows)} of {total} rows are their own commands'")
    for row in (*wrong, *wrong_rows):
        print(row)


def judge(model: str, gpu: str) -> dict[str, Any]:
    """One pair: the longest length that is said to fit, and what plans for it and beyond say."""
    window = load_shipped(model).max_position_embeddings
    longest = make_plan(make_request(model, gpu=gpu), longest=True, whole=False).longest

    def fits(length: int) -> bool:
        request = make_request(model, gpu=gpu, knobs={"max_length": length})
        return make_plan(request, whole=False).fits

    if longest is None:
        shortest = min(STEP, window)
        return {"model": model, "gpu": gpu, "longest": None, "holds": not fits(shortest)}
    length = longest.max_length
    beyond = length + STEP
    holds = fits(length) and (beyond > window or not fits(beyond))
    return {
        "model": model,
        "gpu": gpu,
        "longest": length,
        "reaches_model_limit": longest.reaches_model_limit,
        "holds": holds,
    }


def random_words(chosen: random.Random) -> tuple[str, ...]:
    """What to type for a random model, card and method, and at times another knob."""
    model, card = chosen.choice(list_models()).id, chosen.choice(list(gpu_catalog())).id
    return ("--model", model, "--gpu", card, *chosen.choice(METHODS), *chosen.choice(OTHERS))


def judge_rows(words: Sequence[str]) -> dict[str, Any]:
    """What the rows of a command's whole plan say that their own commands do not."""
    plan = make_plan(typed(words))
    found = list(rows_of(plan))
    wrong = [judged for row in found if (judged := judge_row(words, row)) is not None]
    return {"command": shlex.join(words), "fits": plan.fits, "rows": len(found), "wrong": wrong}


def rows_of(plan: Plan) -> Iterator[Row]:
    """Every row of a plan that names a command."""
    for one in plan.advice:
        if one.flags or one.without:
            figures = {"peak_upper_bytes": one.peak_upper_bytes, "tokens_per_second": one.tokens_per_second}
            yield Row(name=one.title, flags=one.flags, without=one.without, fits=one.fits, **figures)
    for one in plan.methods:
        yield Row(
            name=one.method,
            flags=one.flags,
            without=one.without,
            fits=one.fits,
            peak_upper_bytes=one.peak_upper_bytes,
            tokens_per_second=one.tokens_per_second,
            max_length=one.max_length,
        )
    for one in plan.other_cards:
        figures = {"peak_upper_bytes": one.peak_upper_bytes, "tokens_per_second": one.tokens_per_second}
        yield Row(name=one.gpu, flags=one.flags, fits=True, max_length=one.setup.max_length, **figures)
    for one in plan.smallest_cards:
        yield Row(name=one.gpu, flags=f"--gpu {one.gpu}", fits=True, max_length=one.max_length)


def judge_row(words: Sequence[str], row: Row) -> dict[str, Any] | None:
    """A row and what its command answers; None where they are the same."""
    own = make_plan(typed(changed(words, row)), whole=False)
    said = {
        "fits": row.fits,
        "peak_upper_bytes": row.peak_upper_bytes,
        "tokens_per_second": row.tokens_per_second,
        "max_length": row.max_length or own.setup.max_length,
    }
    answered = {
        "fits": own.fits,
        "peak_upper_bytes": own.memory.peak_upper_bytes,
        "tokens_per_second": None if own.speed is None else own.speed.tokens_per_second,
        "max_length": own.setup.max_length,
    }
    near = {"peak_upper_bytes": MEMORY_BYTES, "tokens_per_second": SPEED_SHARE * (row.tokens_per_second or 0)}
    for name, value in said.items():
        other = answered[name]
        if value is None and row.peak_upper_bytes is None:
            continue
        if value != other and not (value and other and abs(other - value) <= near.get(name, 0)):
            return {"command": shlex.join(changed(words, row)), "said": said, "answered": answered}
    return None


def changed(words: Sequence[str], row: Row) -> tuple[str, ...]:
    """A command with a row's flags in place of its own, and without what the row leaves out."""
    options = _by_option(words) | _by_option(shlex.split(row.flags))
    for name in row.without:
        options.pop(_positive(name), None)
    return tuple(word for words in options.values() for word in words)


def typed(words: Sequence[str]) -> PlanRequest:
    """The request of a command line."""
    parser = Parser()
    add_arguments(parser)
    return request_from(parser.parse_args(words))


def _by_option(words: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = _positive(word)
            found[name] = []
        found[name].append(word)
    return found


def _positive(option: str) -> str:
    return option.replace("--no-", "--", 1)


if __name__ == "__main__":
    main()
