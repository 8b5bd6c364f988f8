"""The curves of a run: loss, learning rate and gradient norm, tokens a second beside the forecast."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical

from launcher.runs.report.facts import predicted_rate
from launcher.tui.run_facts import Points
from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import number
from launcher.tui.widgets.run.line_plot import LinePlot, PlotData
from launcher.tui.widgets.text_line import TextLine

LEAST_SPAN = 5
"""Points that the smoothed loss is the mean of, about, and at least; of a long run a twentieth of all."""
_SHARE = 20


class Charts(Vertical):
    """Three plots, each under a line that says what it shows last."""

    def compose(self) -> ComposeResult:
        """Headings and plots."""
        for name in ("loss", "rate", "speed"):
            with Vertical(id=f"chart-{name}", classes="chart"):
                yield TextLine(id=f"chart-{name}-title", classes="heading")
                yield LinePlot()

    def show(self, snapshot: RunSnapshot) -> None:
        """Show a snapshot."""
        for name, title, data in (
            ("loss", loss_title(snapshot), loss_plot(snapshot)),
            ("rate", rate_title(snapshot), rate_plot(snapshot)),
            ("speed", speed_title(snapshot), speed_plot(snapshot)),
        ):
            self.query_one(f"#chart-{name}-title", TextLine).text = Text(title, no_wrap=True)
            self.query_one(f"#chart-{name}", Vertical).query_one(LinePlot).data = data


def smoothed(points: Points) -> Points:
    """The exponential moving mean of a curve, over a twentieth of its points."""
    if len(points) < LEAST_SPAN:
        return points
    weight = 2 / (max(LEAST_SPAN, len(points) / _SHARE) + 1)
    found, mean = [], points[0][1]
    for x, y in points:
        mean += weight * (y - mean)
        found.append((x, mean))
    return tuple(found)


def loss_plot(snapshot: RunSnapshot) -> PlotData:
    """The loss, its smoothed course over it, and evaluations as points."""
    curves = snapshot.curves
    return PlotData(
        points=curves.losses,
        second=smoothed(curves.losses),
        marks=curves.eval_losses,
        faint=True,
        x_label="step, ● on evaluation data" if curves.eval_losses else "step",
    )


def loss_title(snapshot: RunSnapshot) -> str:
    """The last loss, smoothed, and of evaluations the last and the best."""
    curves = snapshot.curves
    parts = ["loss"]
    if curves.losses:
        last = number(curves.losses[-1][1])
        parts = [f"loss {number(smoothed(curves.losses)[-1][1])} smoothed, {last} last"]
    if curves.eval_losses:
        told = f"eval {number(curves.eval_losses[-1][1])}"
        if snapshot.best_evaluation is not None and len(curves.eval_losses) > 1:
            loss, step = snapshot.best_evaluation
            told += f", best {number(loss)} at {step:,}"
        parts.append(told)
    return " · ".join(parts)


def rate_plot(snapshot: RunSnapshot) -> PlotData:
    """The gradient norm with its scale, the learning rate's course over it."""
    curves = snapshot.curves
    return PlotData(points=curves.grad_norms, second=curves.learning_rates, apart=True, x_label="step")


def rate_title(snapshot: RunSnapshot) -> str:
    """The last of both."""
    log = snapshot.log
    norm, rate = (None, None) if log is None else (log.grad_norm, log.learning_rate)
    return f"gradient norm {_figure(norm)} · learning rate {_figure(rate)}"


def speed_plot(snapshot: RunSnapshot) -> PlotData:
    """Tokens a second, and the forecast as a level line."""
    rates, forecast = snapshot.curves.rates, _forecast(snapshot)
    level = () if forecast is None or not rates else ((rates[0][0], forecast), (rates[-1][0], forecast))
    return PlotData(points=rates, second=level, x_label="step")


def speed_title(snapshot: RunSnapshot) -> str:
    """The median rate so far beside the forecast, by how much they differ, and the time of a step."""
    rate, forecast = snapshot.tokens_per_second, _forecast(snapshot)
    if rate is None and snapshot.log is not None:
        rate = snapshot.log.tokens_per_second
    parts = [f"{_figure(rate)} tokens/s"]
    if forecast is not None:
        beside = "" if not rate else f" ({rate / forecast - 1:+.0%})"
        parts.append(f"forecast {number(forecast)}{beside}")
    return " · ".join(parts)


def _forecast(snapshot: RunSnapshot) -> float | None:
    plan = None if snapshot.prediction is None else snapshot.prediction.plan
    # What a GPU would do says nothing of a run on the CPU.
    return None if plan is None or snapshot.on_gpu is False else predicted_rate(plan)


def _figure(value: object) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else "-"
