"""The forecast of speed, with how sure it is."""

from __future__ import annotations

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.sizing import Sizing
from launcher.tui.text import duration, plain
from launcher.tui.themes import colours
from planner.gpus.price import hours_for, run_cost
from planner.setup.card_limits import torch_build
from planner.text.figures import dollars
from planner.text.speed import price_of
from planner.text.ways import WAY_TITLES


class SpeedPanel(Widget):
    """Tokens a second with its interval, time and price for a million tokens, what bounds it, the basis."""

    DEFAULT_CSS = "SpeedPanel { height: auto; }"

    sizing: reactive[Sizing | None] = reactive(None)

    def watch_sizing(self, old: Sizing | None, new: Sizing | None) -> None:
        """Lay out anew only where the number of lines can change."""
        if _wrapping(old) != _wrapping(new):
            self.refresh(layout=True)

    def render(self) -> Text:
        """Draw the lines."""
        if self.sizing is None:
            return Text("")
        shown = colours(self.app)
        return speed(self.sizing, muted=shown.muted, warning=shown.warning)


def _wrapping(sizing: Sizing | None) -> tuple[object, ...]:
    """What may wrap or is not always there: the rest is of one height."""
    if sizing is None or sizing.step is None:
        return False, "" if sizing is None else sizing.no_step, ""
    step = sizing.step
    return (
        step.calibrated,
        step.basis,
        _price(sizing),
        torch_build(sizing.card.spec),
        step.sharing is None,
        sizing.ways,
    )


def _price(sizing: Sizing) -> str:
    return price_of(sizing.card.spec, sizing.wishes.usd_per_gpu_hour)


def _cost(sizing: Sizing) -> str:
    """What a million tokens cost; nothing where no price is known."""
    if sizing.step is None:
        return ""
    hours = hours_for(1e6, sizing.step.tokens_per_second)
    cost = run_cost(
        hours,
        sizing.card.spec,
        gpu_count=sizing.setup.num_processes,
        usd_per_gpu_hour=sizing.wishes.usd_per_gpu_hour,
    )
    return "" if cost is None else f" and {dollars(cost.usd)}"


def speed(sizing: Sizing, *, muted: str, warning: str) -> Text:
    """The forecast in words."""
    step = sizing.step
    if step is None:
        return Text(plain(sizing.no_step), muted)
    text = Text()
    text.append(f"{step.tokens_per_second:,.0f} tokens/s", "bold")
    text.append(f"  ({step.tokens_per_second_low:,.0f} to {step.tokens_per_second_high:,.0f})", muted)
    text.append("\n")
    text.append(f"{duration(1e6 / step.tokens_per_second)}{_cost(sizing)} per million tokens\n", "bold")
    text.append(f"price {_price(sizing)}\n", muted)
    sequences = sizing.setup.effective_batch_size
    text.append(f"{duration(step.seconds_per_optimizer_step)} per step of {sequences:,} sequences\n", muted)
    text.append(f"bound by {plain(step.bound_by)}\n", muted)
    if step.sharing is not None:
        way, count = WAY_TITLES[sizing.setup.distributed], sizing.setup.num_processes
        text.append(f"{way} on {count} GPUs, {step.sharing.scaling:.2f} times one\n", muted)
    if sizing.ways:
        text.append(f"{', '.join(sizing.ways)}\n", muted)
    build = torch_build(sizing.card.spec)
    if build is not None:
        text.append(f"torch: {build}\n", warning)
    if not step.calibrated:
        text.append("uncalibrated", warning)
        text.append(": ", muted)
    text.append(plain(step.basis), muted)
    return text
