"""The components of the bar with their bytes and shares."""

from __future__ import annotations

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.text import plain, signed_size, size
from launcher.tui.themes import colours, component_colours
from planner.memory import MemoryBreakdown

_MINIMUM_TITLE = 12
_SHARE, _DIFFERENCE = 6, 11


class Legend(Widget):
    """One line a component that holds memory, and the total; beside each its share or, where memory is
    `pinned`, the difference to that.
    """

    DEFAULT_CSS = "Legend { height: auto; }"

    memory: reactive[MemoryBreakdown | None] = reactive(None)
    pinned: reactive[MemoryBreakdown | None] = reactive(None)

    def watch_memory(self, old: MemoryBreakdown | None, new: MemoryBreakdown | None) -> None:
        """Lay out anew only where there are more lines: that takes longer than all the rest."""
        if new is not None and (old is None or _lines(new) > self.content_size.height):
            self.refresh(layout=True)

    def render(self) -> Text:
        """Draw the table over the widget's width."""
        if self.memory is None:
            return Text("")
        width = max(30, self.content_size.width)
        return legend(self.memory, width, muted=colours(self.app).muted, pinned=self.pinned)


def _lines(memory: MemoryBreakdown) -> int:
    return 1 + sum(component.size_bytes > 0 for component in memory.components)


def legend(memory: MemoryBreakdown, width: int, *, muted: str, pinned: MemoryBreakdown | None = None) -> Text:
    """Swatch, title, bytes and share of the total, or the difference to what is pinned."""
    colours = component_colours(component.name for component in memory.components)
    beside = _SHARE if pinned is None else _DIFFERENCE
    title_width = max(_MINIMUM_TITLE, min(width, 64) - 2 - 9 - beside)
    before = {} if pinned is None else {part.name: part.size_bytes for part in pinned.components}
    text = Text(no_wrap=True, overflow="ellipsis")
    for component in memory.components:
        if not component.size_bytes:
            continue
        text.append("█ ", colours[component.name])
        text.append(_column(component.title, title_width))
        text.append(f"{size(component.size_bytes):>9}")
        if pinned is None:
            text.append(_share(component.size_bytes / memory.process_bytes) + "\n", muted)
        else:
            more = component.size_bytes - before.get(component.name, 0)
            text.append(f"{signed_size(more):>{_DIFFERENCE}}\n", "bold" if more else muted)
    text.append(f"  {_column('while training', title_width)}{size(memory.process_bytes):>9}", "bold")
    if pinned is None:
        text.append(f"{1:>6.0%}", muted)
    else:
        text.append(f"{signed_size(memory.process_bytes - pinned.process_bytes):>{_DIFFERENCE}}", "bold")
    return text


def _share(share: float) -> str:
    return f"{share:>6.1%}" if share >= 0.001 else " <0.1%"


def _column(title: str, width: int) -> str:
    return plain(title, width - 1).ljust(width)
