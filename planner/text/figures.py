"""Figures and tables as text: the only place, with render_*.py, that writes GiB and imports rich."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import IO, TYPE_CHECKING, Literal

from planner.text.page import NeedsRichError, Page, Part, is_narrow, wrapped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    Out = Page | Console

GIB = 2**30
WIDE = 68
NARROW = 50
_FILLING = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)
INDENT = 2
"""Blanks before what stands under a heading."""
GAP = 2
"""Blanks between a table's columns."""
LEAST_OF_TEXT = 10
"""Columns that a cell of text or a name keeps in a table."""
BAR_BLOCKS = " ▏▎▍▌▋▊▉█"


def show(render: Callable[[Console], None], file: IO[str] | None = None) -> None:
    """Run what prints to a console, and write all of it at once, without the blanks that fill up lines.

    Colour, width and NO_COLOR are rich's business; text is never read as markup.
    """
    from rich.console import Console

    out = Console(file=file, highlight=False, emoji=False, markup=False)
    with out.capture() as capture:
        render(out)
    (file or sys.stdout).write(_FILLING.sub(r"\1", capture.get()))


def show_page(render: Callable[[Out], None]) -> None:
    """The same of what prints lines and no tables, without rich where it is not needed."""
    page = Page.of(sys.stdout)
    if page is not None:
        with suppress(NeedsRichError):
            render(page)
            sys.stdout.write(_FILLING.sub(r"\1", page.text))
            return
    show(render)


def say(out: Out, *parts: Part, wraps: bool = True) -> None:
    """Print text, parts of it in a style; what does not wrap may be cut by a terminal alone."""
    if isinstance(out, Page):
        out.say(*parts, wraps=wraps)
        return
    from rich.text import Text

    line = Text.assemble(*parts)
    if wraps:
        out.print(line)
    else:
        out.print(line, no_wrap=True, overflow="ignore", crop=False)


def gib(size_bytes: float) -> str:
    """GiB with the unit."""
    return f"{figure(size_bytes)} GiB"


def figure(size_bytes: float) -> str:
    """GiB without the unit, two decimals; what is not zero is not shown as zero."""
    value = size_bytes / GIB
    if 0 < abs(value) < 0.005:
        return "<0.01"
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def signed_gib(size_bytes: float) -> str:
    """GiB with a sign."""
    sign = "-" if size_bytes < 0 else "+"
    return f"{sign}{gib(abs(size_bytes))}"


def count(value: float) -> str:
    """Parameters: 68.8M, 14.8B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value / size < 999.5 else f"{value / size:.0f}{unit}"
    return f"{value:g}"


def rate(tokens_per_second: float | None) -> str:
    """Tokens a second, to three digits: more would claim what no forecast knows."""
    if tokens_per_second is None:
        return "?"
    if tokens_per_second < 10:
        return f"{tokens_per_second:.2g}"
    digits = len(str(int(tokens_per_second)))
    return f"{round(tokens_per_second, min(0, 3 - digits)):,.0f}"


def duration(hours: float) -> str:
    """35 s, 12 min, 3 h 20 min, 4 days 2 h."""
    seconds = hours * 3600
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        whole, rest = divmod(minutes, 60)
        return f"{whole} h {rest} min" if rest and whole < 10 else f"{round(minutes / 60)} h"
    days, rest = divmod(round(minutes / 60), 24)
    if days < 10 and rest:
        return f"{days} days {rest} h"
    return f"{round(minutes / 60 / 24):,} days"


def dollars(usd: float) -> str:
    """A price to the cent; what is not nothing is not shown as nothing."""
    return "under $0.01" if 0 < usd < 0.005 else f"${usd:,.2f}"


def bar(out: Out, share: float, width: int) -> str:
    """A bar of eighths of a character, or of # where the output's encoding has none; above zero it shows."""
    if not _writes_blocks(out.encoding):
        return "#" * max(1 if share > 0 else 0, min(width, round(share * width)))
    eighths = min(width * 8, max(0, round(share * width * 8)))
    if share > 0 and eighths == 0:
        eighths = 1
    full, part = divmod(eighths, 8)
    return "█" * full + (BAR_BLOCKS[part] if part else "")


@cache
def _writes_blocks(encoding: str) -> bool:
    try:
        BAR_BLOCKS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def heading(out: Out, text: str) -> None:
    """Section title."""
    out.print()
    say(out, (text, "bold"))


def pairs(out: Out, rows: Iterable[tuple[str, str]]) -> None:
    """Label and value in two columns; in a narrow terminal one after the other."""
    found = list(rows)
    if out.width < NARROW:
        for label, value in found:
            text = f"{label}: {value}" if label else value
            lines = textwrap.wrap(text, max(20, out.width - 1), initial_indent="  ", subsequent_indent="    ")
            for line in lines:
                say(out, line)
        return
    _beside(out, found, gap=2)


def bullets(out: Out, items: Iterable[str]) -> None:
    """One item a line, wrapped under itself."""
    _beside(out, [("-", item) for item in items], gap=1)


def _beside(out: Out, rows: Sequence[tuple[str, str]], *, gap: int) -> None:
    """A label, and so many blanks from the widest one a text, wrapped under itself."""
    widest = max((_cells(label) for label, _ in rows), default=0)
    room = max(1, out.width - INDENT - widest - gap)
    for label, text in rows:
        filled = label + " " * (widest - _cells(label))
        for line in _wrapped(out, text, room):
            say(out, " " * INDENT, (filled, "dim"), " " * gap, line, wraps=False)
            filled = " " * widest


def _cells(text: str) -> int:
    if is_narrow(text):
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _wrapped(out: Out, text: str, room: int) -> list[str]:
    if is_narrow(text):
        return wrapped(text, room)
    if isinstance(out, Page):
        raise NeedsRichError
    from rich.text import Text

    return [line.plain for line in Text(text).wrap(out, room, overflow="fold")] or [""]


def epochs(passes: float) -> str:
    """1 epoch, 3 epochs."""
    return f"{passes:g} epoch{'' if passes == 1 else 's'}"


def footnote(out: Out, text: str) -> None:
    """A remark under a table."""
    say(out, (text, "dim"))


def columns(
    out: Console, heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[str | Text]], *, indent: int = 2
) -> None:
    """Print a plain table. Columns: a "number" is set right, a "name" is not broken, "text" wraps.

    Where a table is wider than the terminal, text gives way, then the heads of numbers are broken, then names
    give way; a number is never cut. Where that is not enough, rows are printed as blocks, a cell a line.
    """
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    titles = [Text(title, style="dim") for title, _ in heads]
    kinds = [kind for _, kind in heads]
    room = out.width - indent - GAP * (len(heads) - 1)
    content = [max((row[at].cell_len for row in cells), default=0) for at in range(len(heads))]
    full = [max(title.cell_len, width) for title, width in zip(titles, content, strict=True)]
    broken = [max(width, _longest_word(title)) for title, width in zip(titles, content, strict=True)]

    def needed(**least: Sequence[int]) -> int:
        """Characters of all columns: each kind by its own list, or what it must keep of a cell."""
        return sum(least[k][at] if k in least else min(full[at], LEAST_OF_TEXT) for at, k in enumerate(kinds))

    if needed(number=broken) > room:
        _stacked(out, titles, cells, indent)
        return
    breaks = needed(number=full, name=full) > room
    whole_names = needed(number=broken, name=full) <= room
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for at, (title, kind) in enumerate(zip(titles, kinds, strict=True)):
        justify: Literal["left", "right"] = "right" if kind == "number" else "left"
        width = broken[at] if kind == "number" and breaks else None
        unbroken = (kind == "name" and whole_names) or (kind == "number" and not breaks)
        table.add_column(title, justify=justify, width=width, no_wrap=unbroken, overflow="fold")
    for row in cells:
        table.add_row(*row)
    out.print(Padding(table, (0, 0, 0, indent)))


def _longest_word(title: Text) -> int:
    return max(map(len, title.plain.split()), default=0)


def _stacked(out: Console, titles: Sequence[Text], rows: Sequence[Sequence[Text]], indent: int) -> None:
    """Rows as blocks of lines, each a title and its cell."""
    from rich.padding import Padding
    from rich.text import Text

    width = max(title.cell_len for title in titles)
    for row in rows:
        for title, cell in zip(titles, row, strict=True):
            if cell.plain:
                filled = Text.assemble(title, " " * (width - title.cell_len + GAP), cell)
                out.print(Padding(filled, (0, 0, 0, indent)))
        out.print()


def yes_no(fits: bool) -> Text:
    """Whether something fits, in a column of that name."""
    from rich.text import Text

    return Text("yes", style="green") if fits else Text("no", style="red")
