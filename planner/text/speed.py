"""The speed, time and price of a Plan as text, and what another card would bring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.answers.plan import Duration, OtherCard, Plan
from planner.gpus.spec import GpuSpec
from planner.text.figures import bullets, count, dollars, duration, epochs, gib, heading, pairs, rate
from planner.throughput.compilation import FirstStep
from planner.throughput.shared_step import SharedStep

if TYPE_CHECKING:
    from rich.console import Console

BOUND_BY = {
    "compute": "the GPU's matrix work",
    "bandwidth": "the GPU's memory bandwidth",
    "launches": "the host's kernel launches: a larger micro-batch is almost free",
}

FIRST_STEP = "first step"
NO_FORECAST = "no forecast: the card's rates or the time of a knob are not known"


def print_speed(out: Console, plan: Plan) -> None:
    """Print the forecast with its interval, and the time and price of the run."""
    heading(out, "Speed")
    lines = speed_lines(plan)
    if not lines:
        bullets(out, [NO_FORECAST])
        return
    pairs(out, lines)


def speed_lines(plan: Plan) -> list[tuple[str, str]]:
    """The forecast, and the run's time and price; none without a forecast."""
    speed = plan.speed
    if speed is None:
        return []
    sure = "calibrated" if speed.calibrated else "not calibrated on this GPU"
    rows = [
        (
            "tokens/s",
            f"about {rate(speed.tokens_per_second)} ({rate(speed.tokens_per_second_low)} to "
            f"{rate(speed.tokens_per_second_high)}; {sure})",
        ),
        (
            "limit",
            f"{rate(speed.roofline_tokens_per_second)} tokens/s is the roofline: no run of it exceeds that",
        ),
        ("bound by", BOUND_BY.get(speed.bound_by, speed.bound_by)),
        ("a step", f"{duration_of_step(speed.seconds_per_optimizer_step)}"),
    ]
    if speed.first_step is not None:
        rows.append((FIRST_STEP, f"compiles first: {first_step_text(speed.first_step)}"))
    if speed.sharing is not None:
        rows.insert(1, ("scaling", _scaling(speed.sharing, plan.setup.num_processes)))
    if plan.duration is not None:
        rows += list(_duration(plan.duration, plan))
    return rows


def first_step_text(found: FirstStep) -> str:
    """The wait for the first step beyond a usual one, with its interval."""
    interval = f"{found.seconds_low:.0f} to {found.seconds_high:.0f}"
    kept = found.seconds_again < found.seconds
    again = f"; {found.seconds_again:.0f} if compiled here before" if kept else ""
    return f"about {found.seconds:.0f} s ({interval}{again})"


def _scaling(shared: SharedStep, count: int) -> str:
    """What several GPUs gain, and what they say to each other for it."""
    link = f"{shared.bytes_per_second / 1e9:.3g} GB/s of {shared.link}"
    low, high = (value / 1e9 for value in (shared.bytes_per_second_low, shared.bytes_per_second_high))
    return (
        f"{shared.scaling:.2f} times one GPU's rate on {count} GPUs; {shared.received_bytes / 1e9:.3g} GB to "
        f"each a step, at about {link} ({low:.3g} to {high:.3g})"
    )


def duration_of_step(seconds: float) -> str:
    """Seconds of one optimizer step."""
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds / 3600)


def _duration(found: Duration, plan: Plan) -> Iterator[tuple[str, str]]:
    interval = f"{duration(found.hours)} ({duration(found.hours_low)} to {duration(found.hours_high)})"
    if found.steps is None:
        yield "a million tokens", interval
    else:
        if found.useful_tokens_per_second is not None and plan.data is not None:
            padding = 1.0 - found.tokens / (plan.data.processed_tokens * plan.schedule.num_train_epochs)
            useful = f"about {rate(found.useful_tokens_per_second)} tokens/s of the data itself"
            yield "useful tokens", f"{useful}; padding is {max(0.0, padding):.0%} of all tokens"
        passes = epochs(plan.schedule.num_train_epochs)
        yield "time", f"{interval} for {passes}, {found.steps:,} steps, {count(found.tokens)} tokens"
    hourly = hourly_price(plan)
    yield (
        "price",
        f"{hourly} (--price-per-hour USD)" if found.usd is None else f"{dollars(found.usd)} at {hourly}",
    )


def hourly_price(plan: Plan) -> str:
    """The price of a GPU that a plan counts with and whose it is, or that none is known."""
    return price_of(plan.gpu.spec, plan.request.price_usd_per_hour)


def price_of(gpu: GpuSpec, asked: float | None = None) -> str:
    """The price that was asked for; else the catalog's with who asked it and when, or that none is known."""
    if asked is not None:
        return f"${asked:g} a GPU-hour"
    if gpu.price_usd_per_hour is None:
        return f"not known for {gpu.id}"
    text = f"${gpu.price_usd_per_hour:g} a GPU-hour"
    return text if gpu.price_source is None else f"{text} ({gpu.price_source})"


def print_other_cards(out: Console, plan: Plan) -> None:
    """Print one line a card."""
    if not plan.other_cards:
        return
    heading(out, "On another card, for " + ("a million tokens" if plan.data is None else "the data"))
    pairs(out, ((f"{one.gpu}, {gib(one.usable_bytes)}", brings(one)) for one in plan.other_cards))


def brings(one: OtherCard) -> str:
    """What another card would bring, in words."""
    if one.speedup is None:
        text = f"{rate(one.tokens_per_second)} tokens/s at {one.setup.max_length:,} tokens"
    else:
        text = f"{one.speedup:.2g}x as fast"
    text += f": {duration(one.hours)}"
    if one.usd is not None and one.usd_per_gpu_hour is not None:
        text += f", {dollars(one.usd)} at ${one.usd_per_gpu_hour:g} an hour"
    if one.longer_length is not None:
        text += f"; takes {one.longer_length:,} tokens"
    return text + (f"; {', '.join(one.changes)}" if one.changes else "")
