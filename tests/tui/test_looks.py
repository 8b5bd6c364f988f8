"""How every screen looks, at four sizes, dark and light: text and colours, cell by cell.

`pytest tests/tui/test_looks.py --snapshot-update` writes them anew. One that fails writes pictures of what is
wrong; look at them first.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import textual
from rich.style import Style
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import Input

from launcher.tui.themes import DARK, LIGHT
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup

from .conftest import MakeApp, settle
from .every_screen import VIEWS, View, back, every_screen_class, fixed

__all__ = ["fixed"]

# Another Textual draws borders, scroll bars and footers a little differently.
RECORDED_WITH = "8.2"
SIZE = (80, 24)
SIZES = (SIZE, (40, 12), (120, 40), (200, 60))
IN_EVERY_SIZE = ("sizing", "run")
START = TrainingSetup(
    model="qwen2.5-14b", max_length=4096, gradient_accumulation_steps=16, optim=defaults.OPTIM
)


def test_no_screen_is_forgotten() -> None:
    assert {view.screen for view in VIEWS} - {None} == set(every_screen_class())


def look(screen: Screen[Any]) -> str:
    """All that a screen shows: its lines, then for each how many cells in a row have which colours."""
    names: dict[str, str] = {}
    lines, styles = [], []
    for strip in screen._compositor.render_strips():
        cells = [(segment.text, _named(segment.style, names)) for segment in strip if segment.text]
        lines.append("".join(text for text, _ in cells).rstrip())
        runs = [(name, sum(len(text) for text, _ in run)) for name, run in groupby(cells, lambda one: one[1])]
        styles.append(" ".join(f"{name}{length}" for name, length in runs))
    legend = [f"{name} = {style}" for style, name in names.items()]
    return "\n".join([*lines, *legend, *(f"{row} {of}" for row, of in _rows(styles))])


def _rows(styles: list[str]) -> list[tuple[str, str]]:
    """Rows with the same colours together."""
    found = []
    for of, rows in groupby(enumerate(styles), lambda one: one[1]):
        at = [row for row, _ in rows]
        found.append((f"{at[0]}-{at[-1]}" if len(at) > 1 else f"{at[0]}", of))
    return found


def _named(style: Style | None, names: dict[str, str]) -> str:
    told = str(Style.null() if style is None else style.without_color + _colours(style))
    return names.setdefault(told, _letters(len(names)))


def _colours(style: Style) -> Style:
    return Style(color=style.color, bgcolor=style.bgcolor)


def _letters(number: int) -> str:
    return (_letters(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


async def still(pilot: Pilot[None]) -> None:
    """Nothing blinks."""
    for field in pilot.app.screen.query(Input):
        field.cursor_blink = False
        field._cursor_visible = True
    await pilot.pause()


async def resized(pilot: Pilot[None], size: tuple[int, int]) -> None:
    """As after a resize, drawn once, not at each message on the way."""
    with pilot.app.batch_update():
        await pilot.resize_terminal(*size)
        await pilot.pause()
    await still(pilot)


def sizes(view: View, theme: str) -> tuple[tuple[int, int], ...]:
    """A theme changes colours alone: in the light one two screens are looked at in all sizes."""
    every = not view.once and (theme == DARK.name or view.name in IN_EVERY_SIZE)
    return SIZES if every else (SIZE,)


@pytest.mark.slow
@pytest.mark.skipif(
    ".".join(textual.__version__.split(".")[:2]) != RECORDED_WITH,
    reason=f"the looks were recorded with Textual {RECORDED_WITH}",
)
@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("theme", [DARK.name, LIGHT.name])
async def test_every_screen_looks_as_it_was_looked_at(
    make_app: MakeApp, snapshot: Any, tmp_path: Path, theme: str
) -> None:
    app, wrong = make_app(), []
    app._runs_root = Path("runs")
    app.theme = theme
    async with app.run_test(size=SIZE) as pilot:
        await settle(pilot)
        for view in VIEWS:
            await view.open(pilot)
            assert view.screen in (None, type(app.screen)), view.name
            for size in sizes(view, theme):
                if app.size != size:
                    await resized(pilot, size)
                await still(pilot)
                name = f"{view.name} {size[0]}x{size[1]}"
                if look(app.screen) != snapshot(name=name):
                    picture = tmp_path / f"{name}.svg"
                    picture.write_text(app.export_screenshot())
                    wrong.append(f"{name}: {picture}")
            if app.size != SIZE:
                await resized(pilot, SIZE)
            await back(pilot, START)
    assert not wrong, "\n".join(wrong)
