"""The stages of a run with how long each took, in a line."""

from __future__ import annotations

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.runs.report.stages import seconds
from launcher.tui.run_follower import RunSnapshot
from launcher.tui.text import plain
from launcher.tui.themes import Colours, colours

_NAME = 26
_GAP = "   "


class StagesPanel(Widget):
    """The last stages that there is room for, the present one marked."""

    DEFAULT_CSS = "StagesPanel { height: 1; }"

    snapshot: reactive[RunSnapshot | None] = reactive(None)

    def render(self) -> Text:
        """Draw the line."""
        if self.snapshot is None:
            return Text("")
        return stages(self.snapshot, max(24, self.content_size.width), colours(self.app))


def stages(snapshot: RunSnapshot, width: int, shown: Colours) -> Text:
    """As many of the last stages as fit into a width."""
    parts: list[Text] = []
    room = width
    for span in reversed(snapshot.stages):
        now = span.seconds is None
        lasted = snapshot.stage_seconds if now else span.seconds
        part = Text("▸ " if now else "✔ ", shown.primary if now else shown.success)
        part.append(plain(span.text, _NAME), "bold" if now else shown.muted)
        part.append("" if lasted is None else f" {seconds(lasted)}", "bold" if now else shown.muted)
        room -= len(part) + len(_GAP)
        if room < 0 and parts:
            break
        parts.insert(0, part)
    return Text(_GAP).join(parts)
