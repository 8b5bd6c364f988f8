"""The verdict: a badge and the figures it rests on, on one line."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.sizing import Sizing, Verdict
from launcher.tui.text import gib
from launcher.tui.themes import colours

_BADGES = {
    Verdict.FITS: (" ✔ FITS ", "success"),
    Verdict.TIGHT: (" ! TIGHT ", "warning"),
    Verdict.DOES_NOT_FIT: (" ✘ DOES NOT FIT ", "error"),
}
_WIDE, _NARROW = 76, 36
_WIDE_SEARCH = 90
_REFINING = " · refining"
_SEARCHING, _SEARCHING_SHORT = " · searching the fastest setup...", " · searching..."


class VerdictLine(Widget):
    """Badge, expected peak, the interval's upper end, the card's usable bytes, what is left, and whether the
    figures are still to be refined or, `searching`, the setup to be found.
    """

    DEFAULT_CSS = "VerdictLine { height: 1; }"

    sizing: reactive[Sizing | None] = reactive(None)
    stale: reactive[bool] = reactive(False)
    searching: reactive[bool] = reactive(False)

    def render(self) -> Text:
        """Draw the line, shorter where the terminal is narrow."""
        if self.sizing is None:
            return Text("pick a model and a GPU")
        shown = colours(self.app)
        badge, colour = _BADGES[self.sizing.verdict]
        line = Text(no_wrap=True, overflow="ellipsis")
        if self.stale:
            return line.append(
                "last answer: " + figures(self.sizing, short=self.size.width < _WIDE + 14), shown.muted
            )
        line.append(badge, Style(color=shown.background, bgcolor=shown.named(colour), bold=True))
        line.append("  ")
        more = self._what_is_to_come()
        # Room is kept for what comes and goes, so that the figures stay as they are.
        room = self.size.width - len(badge) - max(len(more), len(_REFINING))
        line.append(figures(self.sizing, short=room < _WIDE) if room >= _NARROW else least(self.sizing))
        return line.append(more, shown.muted)

    def _what_is_to_come(self) -> str:
        if self.searching:
            return _SEARCHING if self.size.width >= _WIDE_SEARCH else _SEARCHING_SHORT
        return "" if self.sizing is None or self.sizing.refined else _REFINING


def least(sizing: Sizing) -> str:
    """The figure that decides, of what the card leaves."""
    upper = gib(sizing.memory.peak_upper_bytes).removesuffix(" GiB")
    return f"at most {upper} of {gib(sizing.card.usable_bytes)}"


def figures(sizing: Sizing, *, short: bool) -> str:
    """The figures of the verdict in words."""
    memory = sizing.memory
    usable = sizing.card.usable_bytes
    left = sizing.headroom_bytes
    rest = f"{gib(left)} left" if left >= 0 else f"{gib(-left)} too much"
    if short:
        peak, upper = gib(memory.peak_bytes).removesuffix(" GiB"), gib(memory.peak_upper_bytes)
        return f"{peak}, at most {upper} · {rest}"
    return (
        f"needs {gib(memory.peak_bytes)}, at most {gib(memory.peak_upper_bytes)}, of {gib(usable)} usable"
        f" · {rest}"
    )
