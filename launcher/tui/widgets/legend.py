"""The components of the bar with their bytes and shares."""

from __future__ import annotations

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from launcher.tui.text import plain, size
from launcher.tui.themes import colours, component_colours
from planner.memory import MemoryBreakdown

_MINIMUM_TITLE = 12


class Legend(Widget):
    """One line a component that holds memory, and the total."""

    DEFAULT_CSS = "Legend { height: auto; }"

    memory: reactive[MemoryBreakdown | None] = reactive(None)

    def watch_memory(self, old: MemoryBreakdown | None, new: MemoryBreakdown | None) -> None:
        """Lay out anew only where there are more lines: that takes longer than all the rest."""
        if new is not None and (old is None or _lines(new) > self.content_size.height):
            self.refresh(layout=True)

    def render(self) -> Text:
        """Draw the table over the widget's width."""
        if self.memory is None:
            return Text("")
        return legend(self.memory, max(30, self.content_size.width), muted=colours(self.app).muted)


def _lines(memory: MemoryBreakdown) -> int:
    return 1 + sum(component.size_bytes > 0 for component in memory.components)


def legend(memory: MemoryBreakdown, width: int, *, muted: str) -> Text:
    """Swatch, title, bytes and share of the total, largest share last digit aligned."""
    colours = component_colours(component.name for component in memory.components)
    title_width = max(_MINIMUM_TITLE, min(width, 64) - 2 - 9 - 6)
    text = Text(no_wrap=True, overflow="ellipsis")
    for component in memory.components:
        if not component.size_bytes:
            continue
        share = component.size_bytes / memory.process_bytes
        text.append("█ ", colours[component.name])
        text.append(_column(component.title, title_width))
        text.append(f"{size(component.size_bytes):>9}")
        text.append(f"{share:>6.1%}\n" if share >= 0.001 else " <0.1%\n", muted)
    text.append(f"  {_column('while training', title_width)}{size(memory.process_bytes):>9}", "bold")
    text.append(f"{1:>6.0%}", muted)
    return text


def _column(title: str, width: int) -> str:
    return plain(title, width - 1).ljust(width)
