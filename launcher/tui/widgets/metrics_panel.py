"""The figures of the last log event."""

from __future__ import annotations

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import duration, number
from launcher.tui.themes import colours

_CELL = 24


class MetricsPanel(Widget):
    """Name and value pairs in as many columns as the width has room for."""

    DEFAULT_CSS = "MetricsPanel { height: auto; }"

    snapshot: reactive[RunSnapshot | None] = reactive(None, layout=True)

    def render(self) -> Text:
        """Draw the pairs."""
        if self.snapshot is None:
            return Text("")
        muted = colours(self.app).muted
        columns = max(1, min(3, self.content_size.width // _CELL))
        cell = max(_CELL, self.content_size.width // columns)
        text = Text(no_wrap=True, overflow="ellipsis")
        pairs = metrics(self.snapshot)
        for index, (name, value) in enumerate(pairs):
            if index and index % columns == 0:
                text.append("\n")
            text.append(f"{name:<11}", muted)
            text.append(f"{value:<{cell - 11}}", "bold")
        return text


def metrics(snapshot: RunSnapshot) -> tuple[tuple[str, str], ...]:
    """Figures of the last log, a dash for what it does not say."""
    log = snapshot.log
    seconds = log.step_seconds if log is not None else None
    evaluation = snapshot.eval_losses[-1][1] if snapshot.eval_losses else None
    return (
        ("loss", _number(log.loss if log else None)),
        ("tokens/s", _number(log.tokens_per_second if log else None)),
        ("learn rate", _number(log.learning_rate if log else None)),
        ("eval loss", _number(evaluation)),
        ("step time", duration(seconds) if isinstance(seconds, int | float) else "-"),
        ("grad norm", _number(log.grad_norm if log else None)),
    )


def _number(value: object) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else "-"
