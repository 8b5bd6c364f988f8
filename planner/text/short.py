"""A Plan as text on one page: verdict, setup, memory, speed and time, and what to do next.

Every figure of it is on the full page as well (planner/text/plan.py).
"""

from __future__ import annotations

import io
import shlex
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from planner.answers.plan import Advice, Plan
from planner.setup.card_limits import torch_build
from planner.setup.objective import SFT
from planner.setup.options import option
from planner.setup.request import DEFAULT_RANK
from planner.text.choice import how, what_else
from planner.text.data import not_trained
from planner.text.figures import NARROW, bar, bullets, figure, footnote, gib, heading, pairs, rate
from planner.text.page import NeedsRichError, Page
from planner.text.plan import knob_lines, setup_lines
from planner.text.speed import FIRST_STEP, NO_FORECAST, speed_lines
from planner.text.verdict import print_verdict

if TYPE_CHECKING:
    from planner.text.figures import Out

MOST_LINES = 30
"""Lines of the page at 80 columns: what a person sees at once, with the command above it."""
_ROOMS = ((6, 3), (5, 3), (4, 3), (4, 2), (3, 2), (3, 1), (2, 1), (1, 0))
"""Parts of the memory and things to change that are shown: the first that the page has room for."""
_TIMES = ("tokens/s", "time", "a million tokens", "price")
TOLD_WAIT_SECONDS = 30.0
"""A longer wait for the first step is told on this page."""
_NAME_WIDTH = 25
_BAR_WIDTH = 30


def print_short(out: Out, plan: Plan, *, starts: bool = False) -> None:
    """Print a plan on one page; where lines are few, the smaller parts and later advice give way.

    What `starts` needs no word on how to start it.
    """
    command = _train_command(plan) if plan.fits and not starts else None

    def has_room(room: tuple[int, int]) -> bool:
        return _lines(plan, command, out.width, *room) <= MOST_LINES

    # Every room has fewer lines than the one before; most plans are short enough for the first.
    room = 0 if has_room(_ROOMS[0]) else 1 + bisect_left(_ROOMS[1:-1], True, key=has_room)
    _page(out, plan, command, *_ROOMS[room])


def _lines(plan: Plan, command: str | None, width: int, parts: int, changes: int) -> int:
    page = Page(width=width, encoding="utf-8", styled=False)
    with suppress(NeedsRichError):
        _page(page, plan, command, parts, changes)
        return len(page.written)
    from rich.console import Console

    text = io.StringIO()
    out = Console(file=text, width=width, highlight=False, emoji=False, markup=False)
    _page(out, plan, command, parts, changes)
    return text.getvalue().count("\n")


def _page(out: Out, plan: Plan, command: str | None, parts: int, changes: int) -> None:
    print_verdict(out, plan)
    heading(out, "Setup" if plan.fits else "Smallest setup tried")
    pairs(out, _setup(plan))
    _memory(out, plan, parts)
    if plan.fits:
        _times(out, plan)
    _next(out, plan, command, changes)


def _times(out: Out, plan: Plan) -> None:
    heading(out, "Speed and time")
    waits = plan.speed is not None and plan.speed.compile_seconds > TOLD_WAIT_SECONDS
    times = (*_TIMES, FIRST_STEP) if waits else _TIMES
    found = [line for line in speed_lines(plan) if line[0] in times]
    if found:
        pairs(out, found)
    else:
        bullets(out, [NO_FORECAST])


def _setup(plan: Plan) -> Iterator[tuple[str, str]]:
    """The full page's lines, some of them put into one."""
    lines = dict(setup_lines(plan))
    for label in ("method", "adapter"):
        if label in lines:
            yield label, lines[label] + (_usual_rank(plan) if label == "adapter" else "")
    yield "batch", f"{lines['length']}: {lines['batch']}"
    yield "training", f"{lines['optimizer']}, learning rate {lines['learning rate']}"
    layers = [("checkpointing", lines["checkpointing"]), ("attention", plan.model.attn_implementation)]
    layers += knob_lines(plan.setup)
    yield "layers", ", ".join(f"{label} {value}" for label, value in layers)
    if "learning" in lines:
        yield "learning", lines["learning"]
    if plan.data is not None and (lacking := not_trained(plan.data)):
        yield "data", lacking


def _usual_rank(plan: Plan) -> str:
    """That the usual rank does not fit, where a lower one was taken for it."""
    lower = plan.setup.lora_r < DEFAULT_RANK and "lora_r" not in plan.request.fixed
    return f" (rank {DEFAULT_RANK} does not fit)" if plan.fits and lower else ""


def _memory(out: Out, plan: Plan, shown: int) -> None:
    memory = plan.memory
    by_size = sorted(memory.components, key=lambda one: one.size_bytes, reverse=True)
    largest = by_size[0].size_bytes or 1
    heading(out, "Memory, its largest parts" + (" of each GPU" if plan.setup.num_processes > 1 else ""))
    rows = []
    for part in memory.components:
        if part.size_bytes and part in by_size[:shown]:
            width = min(_BAR_WIDTH, out.width - _NAME_WIDTH - 18)
            drawn = "" if out.width < NARROW else "  " + bar(out, part.size_bytes / largest, width)
            rows.append((part.title, f"{figure(part.size_bytes):>6} GiB{drawn}"))
    rows.append(("what the driver will show", f"{figure(memory.process_bytes):>6} GiB"))
    telling = [note for note in plan.notes if note.size_bytes >= memory.peak_bytes / 2]
    if telling and not plan.fits:
        # The last is the most special one: of weights as a whole, then of those that stay in 16 bits.
        rows.append(("why", telling[-1].text.replace("{size}", gib(telling[-1].size_bytes))))
    pairs(out, rows)


def _next(out: Out, plan: Plan, command: str | None, changes: int) -> None:
    heading(out, "Next")
    rows = [] if command is None else [("train it", command)]
    build = torch_build(plan.gpu.spec)
    if build is not None:
        rows.append(("before", f"torch: {build}"))
    if not plan.fits:
        # What uses the memory that is left takes a search each: it is on the full page.
        rows += [(one.title, _change(one)) for one in plan.advice if one.fits][:changes]
    pairs(out, rows)
    footnote(out, "  --full: other ranks, methods, setups and cards, and what the numbers rest on")


def _train_command(plan: Plan) -> str | None:
    """What starts it, as far as it was asked for: what was chosen is chosen again; none of what is planned
    alone.
    """
    if plan.setup.objective is not SFT:
        return None
    request = plan.request
    words = ["vramwise", "train", "--model", request.model]
    for name, value in (
        *request.knobs,
        ("effective_batch_size", request.effective_batch_size),
        ("epochs", request.num_train_epochs),
        ("learning_rate", request.learning_rate),
    ):
        if value is not None:
            words += option(name, value)
    if request.allow_8bit:
        words += option("allow_8bit", True)
    data = "FILE" if request.data is None else request.data
    return f"{shlex.join(words)} --data {shlex.quote(data)}"


def _change(one: Advice) -> str:
    what = [how(one), *what_else(one)]
    return f"{gib(one.peak_upper_bytes)}, {rate(one.tokens_per_second)} tokens/s: {', '.join(what)}"
