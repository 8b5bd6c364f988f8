"""What a Plan was chosen from, as text: methods, the frontier, why others lost, and what to change."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from planner.answers.plan import FrontierPoint, Plan, RunnerUp
from planner.setup.training_setup import TrainingSetup
from planner.text.figures import WIDE, bullets, columns, duration, figure, gib, heading, rate, yes_no

METHOD_TITLES = {"qlora": "QLoRA", "lora": "16-bit LoRA", "full": "full fine-tuning"}


def print_methods(out: Console, plan: Plan) -> None:
    """Print each method with what it would need."""
    if len(plan.methods) < 2:
        return
    setup = plan.setup
    heading(
        out,
        f"Methods compared, at {setup.max_length:,} tokens, micro-batch {setup.per_device_train_batch_size}",
    )
    wide = out.width >= WIDE
    heads = [("", "name"), ("weights", "number"), ("peak GiB", "number"), ("fits", "name")]
    if wide:
        heads += [("tokens/s", "number"), ("smallest card", "name")]
    rows: list[list[str | Text]] = []
    for one in plan.methods:
        title = METHOD_TITLES[one.method] if wide else one.method
        row: list[str | Text] = [title, figure(one.weights_bytes), figure(one.peak_upper_bytes)]
        row.append(yes_no(one.fits))
        if wide:
            row += [rate(one.tokens_per_second), one.smallest_gpu or "none"]
        rows.append(row)
    columns(out, heads, rows)


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
    heads = [("batch", "number"), ("", "text"), ("peak GiB", "number"), ("tokens/s", "number")]
    if timed:
        heads.append(("time", "name"))
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
    table: list[list[str | Text]] = []
    wide = out.width >= WIDE
    for one in plan.advice:
        row: list[str | Text] = [one.title, figure(one.peak_upper_bytes)]
        if not plan.fits:
            row.append(yes_no(one.fits))
        if wide:
            if plan.fits:
                row.append(rate(one.tokens_per_second))
            row.append(one.flags or one.effect)
        table.append(row)
    heads = [("", "text"), ("peak GiB", "number")]
    if not plan.fits:
        heads.append(("fits", "name"))
    if wide:
        if plan.fits:
            heads.append(("tokens/s", "number"))
        heads.append(("", "text"))
    columns(out, heads, table)


def _batch(setup: TrainingSetup) -> str:
    return f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps}"


def _lost(one: RunnerUp) -> str:
    if one.lacking_bytes:
        text = f"{gib(one.lacking_bytes)} too large"
        return f"{one.faster:.1%} faster, but {text}" if one.faster > 0 else text
    if one.lost == "slower":
        return f"fits, but {-one.faster:.1%} slower"
    return f"fits, as fast, but {'offloads' if one.lost == 'offloads' else 'larger'}"
