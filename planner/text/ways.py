"""Ways to use several GPUs, as text: which was taken, and what the others lose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.answers.plan import Plan, WayFigures
from planner.setup.parallelism import DDP, FSDP
from planner.text.figures import WIDE, columns, dollars, duration, figure, gib, heading, rate, yes_no

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WAY_TITLES = {None: "one GPU alone", DDP: "DDP", FSDP: "FSDP2"}


def way_sentences(plan: Plan) -> Iterator[str]:
    """How several GPUs are used, what all of them gain, and what the other ways lose."""
    setup, speed = plan.setup, plan.speed
    if setup.num_processes > 1:
        text = f"{WAY_TITLES[setup.distributed]} on {setup.num_processes} GPUs"
        if speed is not None and speed.sharing is not None:
            text += f", {speed.sharing.scaling:.2f} times one GPU's rate at this micro-batch"
    else:
        text = "One GPU alone"
        if plan.gpu.count > 1:
            left = plan.gpu.count - 1
            text += f"; {'the other is' if left == 1 else f'the other {left} are'} not used"
    others = [_loses(one) for one in plan.ways if one.lost]
    if plan.gpu.count > 1 or setup.num_processes > 1:
        yield "; ".join([text, *others]) + "."


def _loses(one: WayFigures) -> str:
    title = WAY_TITLES[one.distributed]
    if one.lost == "too large":
        return f"{title} lacks {gib(int(one.amount))}"
    if one.lost == "shorter":
        return f"{title} takes {one.max_length:,} tokens"
    return f"{title} is {_slower(one)}" if one.lost != "refused" else f"{title} cannot run it"


def _slower(one: WayFigures) -> str:
    return f"{one.amount:.0%} slower" if one.lost == "slower" else "as fast"


def _why(one: WayFigures) -> str:
    """Why a way was not taken, for a line of its own."""
    if one.lost in ("slower", "tie"):
        return _slower(one)
    why = {"": "chosen", "too large": f"lacks {gib(int(one.amount))}", "shorter": "shorter"}
    return why.get(one.lost, one.reason)


def print_ways(out: Console, plan: Plan) -> None:
    """Print a line a way, with what a plan for it answers."""
    if not plan.ways:
        return
    heading(out, "Ways to use the GPUs, each as a plan for it has it (--num-processes, --distributed)")
    wide = out.width >= WIDE
    heads = [("", "name"), ("GPUs", "number"), ("length", "number"), ("peak GiB", "number"), ("fits", "name")]
    if wide:
        heads += [("tokens/s", "number"), ("time", "name"), ("price", "name"), ("", "text")]
    rows: list[list[str | Text]] = []
    for one in plan.ways:
        length = "" if one.max_length is None else f"{one.max_length:,}"
        peak = "" if one.peak_upper_bytes is None else figure(one.peak_upper_bytes)
        row: list[str | Text] = [
            WAY_TITLES[one.distributed],
            str(one.num_processes),
            length,
            peak,
            yes_no(one.fits),
        ]
        if wide:
            row += [
                rate(one.tokens_per_second),
                "" if one.hours is None else duration(one.hours),
                "" if one.usd is None else dollars(one.usd),
                _why(one),
            ]
        rows.append(row)
    columns(out, heads, rows)
