"""What a Plan was chosen from, as text: methods, the frontier, why others lost, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.answers.plan import Advice, FrontierPoint, MethodFigures, Plan, RunnerUp
from planner.setup.training_setup import TrainingSetup
from planner.text.figures import WIDE, bullets, columns, duration, figure, gib, heading, rate, yes_no

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LEAST_TOLD = 0.01
"""A difference in speed that is told: what is less is a tie to the search as well."""
METHOD_TITLES = {"qlora": "QLoRA", "lora": "16-bit LoRA", "full": "full fine-tuning"}


def method_title(setup: TrainingSetup) -> str:
    """What people call how a setup trains."""
    return "8-bit LoRA" if setup.load_in_8bit else METHOD_TITLES[setup.method]


def print_methods(out: Console, plan: Plan) -> None:
    """Print what a plan for each method answers, the smallest cards that take it, and what else differs."""
    if len(plan.methods) < 2:
        return
    heading(out, "Methods compared, each as a plan for it has it (--method)")
    wide = out.width >= WIDE
    heads = [("", "name"), ("length", "number"), ("peak GiB", "number"), ("fits", "name")]
    if wide:
        heads += [("tokens/s", "number"), ("desktop card", "name"), ("card to rent", "name")]
    rows: list[list[str | Text]] = []
    for one in plan.methods:
        length = "" if one.max_length is None else f"{one.max_length:,}"
        row: list[str | Text] = [one.method, length, figure(one.peak_upper_bytes), yes_no(one.fits)]
        if wide:
            row += [rate(one.tokens_per_second), one.desktop_card or "none", one.rented_card or "none"]
        rows.append(row)
    columns(out, heads, rows)
    for one in plan.methods:
        words = [word for word in (without(one.without), *what_else(one)) if word]
        if words:
            bullets(out, [f"{one.method}: {', '.join(words)}"])


def print_frontier(out: Console, plan: Plan) -> None:
    """Print the setups that no other one beats in both speed and memory, those around the chosen one."""
    shown = plan.neighbours
    if not plan.fits or len(shown) < 2:
        return
    heading(out, "Speed against memory: setups that none tried beats in both")
    timed = plan.data is not None
    if out.width < WIDE:
        bullets(out, [_in_words(one, timed=timed) for one in shown])
        return
    from rich.text import Text

    rows: list[list[str | Text]] = []
    for one in shown:
        rows.append(
            [
                _batch(one.setup),
                one.strategy,
                figure(one.peak_upper_bytes),
                rate(one.tokens_per_second),
                *([duration(one.hours)] if timed else []),
                yes_no(one.fits),
                Text("chosen" if one.chosen else "", style="bold"),
            ]
        )
    heads = [("batch", "number"), ("", "text"), ("peak GiB", "number")]
    # With data, of its own tokens: padding is no progress.
    heads += [("useful/s", "number"), ("time", "name")] if timed else [("tokens/s", "number")]
    heads += [("fits", "name"), ("", "name")]
    columns(out, heads, rows)


def _in_words(one: FrontierPoint, *, timed: bool) -> str:
    """A point of the frontier for a terminal that has no room for the table."""
    figures = [f"{figure(one.peak_upper_bytes)} GiB", f"{rate(one.tokens_per_second)} tokens/s"]
    if timed:
        figures.append(duration(one.hours))
    figures.append("chosen" if one.chosen else "fits" if one.fits else "too large")
    return f"{_batch(one.setup)} {one.strategy}: {', '.join(figures)}"


def print_runners_up(out: Console, plan: Plan) -> None:
    """Print why the next best lost."""
    if not plan.runners_up or not plan.fits:
        return
    heading(out, "Why not another setup")
    rows = [
        [
            f"{one.per_device_train_batch_size} x {one.gradient_accumulation_steps}",
            one.strategy,
            _lost(one),
        ]
        for one in plan.runners_up
    ]
    columns(out, [("batch", "number"), ("", "text"), ("", "text")], rows)


def print_advice(out: Console, plan: Plan) -> None:
    """Print what makes it fit, or what uses the memory that is left."""
    if not plan.advice:
        return
    heading(out, "To use what is left" if plan.fits else "To make it fit")
    if out.width < WIDE:
        rows: list[list[str | Text]] = [
            [one.title, figure(one.peak_upper_bytes), yes_no(one.fits)] for one in plan.advice
        ]
        columns(out, [("", "text"), ("peak GiB", "number"), ("fits", "name")], rows)
        return
    rows = [
        [figure(one.peak_upper_bytes), yes_no(one.fits), rate(one.tokens_per_second), _told(one)]
        for one in plan.advice
    ]
    columns(out, [("peak GiB", "number"), ("fits", "name"), ("tokens/s", "number"), ("", "text")], rows)


def _told(one: Advice) -> str:
    """A change: what it is and how to ask for it, then what else is different."""
    changes = ", ".join(what_else(one))
    return f"{one.title}: {how(one)}" + (f"\n{changes}" if changes else "")


def how(one: Advice) -> str:
    """What to type and what to leave out for a change; what it does where nothing can be typed."""
    return " ".join(word for word in (one.flags, without(one.without)) if word) or one.effect


def without(options: tuple[str, ...]) -> str:
    """Which options to leave out, in words; empty for none."""
    return f"without {', '.join(options)}" if options else ""


def what_else(one: Advice | MethodFigures) -> tuple[str, ...]:
    """How a row's setup differs from the plan's, and what that does to speed; of one that fits, as what does
    not will not be run.
    """
    if not one.fits:
        return ()
    if one.faster is None or abs(one.faster) < LEAST_TOLD:
        return one.changes
    return (*one.changes, f"{abs(one.faster):.0%} {'faster' if one.faster > 0 else 'slower'}")


def _batch(setup: TrainingSetup) -> str:
    return f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps}"


def _lost(one: RunnerUp) -> str:
    if one.lacking_bytes:
        text = f"{gib(one.lacking_bytes)} too large"
        return f"{one.faster:.1%} faster, but {text}" if one.faster > 0 else text
    if one.lost == "slower":
        return f"fits, but {-one.faster:.1%} slower"
    return f"fits, as fast, but {'offloads' if one.lost == 'offloads' else 'larger'}"
