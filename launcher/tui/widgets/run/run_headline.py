"""Where a run stands: state, what it trains, progress, time left."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.runs.report.stages import seconds
from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import duration, plain
from launcher.tui.themes import colours

_COLOURS = {
    "running": "success",
    "finished": "success",
    "starting": "primary",
    "created": "primary",
    "stopping": "warning",
    "stopped": "warning",
    "unknown": "warning",
}


class RunHeadline(Widget):
    """Three lines: badge and job, progress bar, figures or the message of the end."""

    DEFAULT_CSS = "RunHeadline { height: 3; }"

    snapshot: reactive[RunSnapshot | None] = reactive(None)
    seconds_since: reactive[float] = reactive(0.0)

    def render(self) -> Text:
        """Draw the lines."""
        if self.snapshot is None:
            return Text("reading the run folder")
        drawn = colours(self.app)
        state_colour = drawn.named(_COLOURS.get(self.snapshot.state, "error"))
        first = Text(no_wrap=True, overflow="ellipsis")
        badge = Style(color=drawn.background, bgcolor=state_colour, bold=True)
        first.append(f" {plain(self.snapshot.state).upper()} ", badge)
        first.append("  ")
        first.append(describe_job(self.snapshot))
        width = max(10, self.content_size.width)
        bar = progress_bar(self.snapshot, width, done=state_colour, rest=drawn.track)
        last = Text(figures(self.snapshot, self.seconds_since), no_wrap=True, overflow="ellipsis")
        for line in (first, last):
            line.truncate(width, overflow="ellipsis")
        return Text("\n").join([first, bar, last])


def describe_job(snapshot: RunSnapshot) -> str:
    """What the run trains."""
    if snapshot.job is None:
        return plain(snapshot.folder.shown.name)
    setup = snapshot.job.setup
    rank = f" r{setup.lora_r}" if setup.uses_lora else ""
    # Of a folder the last two names: many are called "model".
    model = "/".join(setup.model.rstrip("/").split("/")[-2:])
    data = snapshot.job.data_path.rsplit("/", 1)[-1]
    return (
        f"{plain(model, 40)} · {setup.method}{rank} · {setup.max_length:,} tokens · "
        f"{setup.per_device_train_batch_size} x {setup.gradient_accumulation_steps} · {plain(data, 40)}"
    )


def progress_bar(snapshot: RunSnapshot, width: int, *, done: str, rest: str) -> Text:
    """A thin bar over the whole width."""
    share = min(1.0, snapshot.step / snapshot.total_steps) if snapshot.total_steps else 0.0
    filled = int(share * width)
    bar = Text("━" * filled, done, no_wrap=True)
    return bar.append("━" * (width - filled), rest)


def figures(snapshot: RunSnapshot, seconds_since: float) -> str:
    """Step, share, time left; or why it ended."""
    if snapshot.total_steps:
        share = snapshot.step / snapshot.total_steps
        parts = [f"step {snapshot.step:,} of {snapshot.total_steps:,}", f"{share:.0%}"]
    else:
        parts = [f"step {snapshot.step:,}"] if snapshot.step else []
    if snapshot.left is not None:
        left = [
            duration(max(0.0, value - seconds_since))
            for value in (snapshot.left.seconds, snapshot.left.low, snapshot.left.high)
        ]
        between = "" if left[1] == left[2] else f" ({left[1]} to {left[2]})"
        parts.append(f"about {left[0]} left{between}")
        if snapshot.seconds is not None:
            parts.append(f"{duration(snapshot.seconds)} so far")
    if snapshot.stage and snapshot.stage != "training":
        since = snapshot.stage_seconds
        elapsed = "" if since is None else f", {seconds(since + seconds_since)}"
        parts.insert(0, f"{plain(snapshot.stage, 120)}{elapsed}")
    if snapshot.behind:
        parts.append(f"reading, {snapshot.event_count:,} events so far")
    if snapshot.message:
        parts.append(plain(snapshot.message, 300))
    return " · ".join(parts)
