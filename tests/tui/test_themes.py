"""Every theme that the palette offers, on every screen."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from rich.segment import Segment
from textual.color import Color
from textual.pilot import Pilot
from textual.screen import Screen
from textual.theme import BUILTIN_THEMES

from launcher.tui import run_follower, starting
from launcher.tui.screens import run as run_screen
from launcher.tui.screens.confirm import Confirm
from launcher.tui.screens.data_picker import DataPicker
from launcher.tui.screens.help import Help
from launcher.tui.screens.needs import NeedsScreen
from launcher.tui.screens.picker import Picker
from launcher.tui.screens.run import RunScreen
from launcher.tui.screens.runs import RunsScreen
from launcher.tui.screens.sizing import SizingScreen
from launcher.tui.screens.start_run import StartRun
from launcher.tui.themes import DARK, LEAST_CONTRAST, LIGHT, colours, completed, contrast
from launcher.tui.widgets.sizing.knob_form import KnobForm

from . import synthetic
from .conftest import MakeApp, settle

THEMES = (*BUILTIN_THEMES, DARK.name, LIGHT.name)
SIZE = (80, 24)
Open = Callable[[Pilot[None]], Awaitable[None]]


def pressing(*keys: str) -> Open:
    async def opened(pilot: Pilot[None]) -> None:
        await pilot.press(*keys)
        await settle(pilot)

    return opened


async def an_invalid_value(pilot: Pilot[None]) -> None:
    await pilot.press("0", "down")
    await settle(pilot)


SCREENS: dict[str, tuple[Open, str]] = {
    "sizing": (pressing(), SizingScreen.__name__),
    "sizing, an invalid value": (an_invalid_value, SizingScreen.__name__),
    "help": (pressing("question_mark"), Help.__name__),
    "models": (pressing("m"), Picker.__name__),
    "cards": (pressing("g"), Picker.__name__),
    "runs": (pressing("o"), RunsScreen.__name__),
    "data": (pressing("d"), DataPicker.__name__),
    "needs": (pressing("n"), NeedsScreen.__name__),
    "start form": (pressing("t"), StartRun.__name__),
    "command palette": (pressing("ctrl+p"), "CommandPalette"),
    "a list of choices": (pressing("up", "enter"), SizingScreen.__name__),
}


def segments(screen: Screen[object]) -> list[Segment]:
    """All that a screen shows."""
    return [segment for strip in screen._compositor.render_strips() for segment in strip]


def used(pilot: Pilot[None]) -> set[str]:
    """Colours of the texts that are on the screen."""
    styles = [segment.style for segment in segments(pilot.app.screen) if segment.style is not None]
    return {style.color.triplet.hex for style in styles if style.color is not None and style.color.triplet}


async def goes_through_all_themes(pilot: Pilot[None]) -> None:
    """Shows every theme; nothing stays in the muted colour of the one before."""
    before = ""
    assert set(pilot.app.available_themes) == set(THEMES)
    for theme in THEMES:
        pilot.app.theme = theme
        await pilot.pause()
        assert "".join(segment.text for segment in segments(pilot.app.screen)).strip(), theme
        muted = colours(pilot.app).muted.lower()
        if before not in {value.lower() for value in pilot.app.theme_variables.values()}:
            assert before not in used(pilot), theme
        before = muted


@pytest.mark.slow
@pytest.mark.parametrize("name", SCREENS)
async def test_every_theme_is_shown_over_sizing(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(starting, "refuse_what_cannot_start", lambda answer: None)
    opens, screen = SCREENS[name]
    async with make_app(model="qwen2.5-0.5b").run_test(size=SIZE) as pilot:
        await settle(pilot)
        await opens(pilot)
        assert type(pilot.app.screen).__name__ == screen
        # Half of what lies beneath would be restyled in vain: it is a case of its own.
        for beneath in pilot.app.screen_stack[:-1]:
            await beneath.query(KnobForm).remove()
        await goes_through_all_themes(pilot)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), ("s",)], ids=["run", "stop question"])
async def test_every_theme_is_shown_over_a_run(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    monkeypatch.setattr(run_follower, "is_alive", lambda folder: True)
    monkeypatch.setattr(run_screen, "POLL_SECONDS", 3600.0)
    app = make_app(run=synthetic.half_way(tmp_path / "run"))
    async with app.run_test(size=SIZE) as pilot:
        await settle(pilot)
        await pilot.press(*keys)
        await settle(pilot)
        assert isinstance(app.screen, Confirm if keys else RunScreen)
        await goes_through_all_themes(pilot)


@pytest.mark.parametrize("name", [name for name in BUILTIN_THEMES if not BUILTIN_THEMES[name].ansi])
def test_muted_text_can_be_read_where_the_theme_s_own_text_can(name: str) -> None:
    theme = BUILTIN_THEMES[name]
    found = completed(theme, theme.to_color_system().generate())
    text = Color.parse(found["foreground"])
    for ground in (Color.parse(found["background"]), Color.parse(found["panel"])):
        assert contrast(Color.parse(found["muted"]), ground) >= min(LEAST_CONTRAST, contrast(text, ground))


def test_contrast_is_that_of_the_guidelines() -> None:
    black, white, grey = Color.parse("#000000"), Color.parse("#ffffff"), Color.parse("#777777")
    assert contrast(black, white) == pytest.approx(21)
    # 4.48: the grey that just misses the bar for text on white.
    assert contrast(grey, white) == pytest.approx(4.478, abs=0.001)


@pytest.mark.parametrize("name", ["vramwise-dark", "nord", "ansi-dark"])
async def test_the_verdict_can_be_read_on_its_badge(make_app: MakeApp, name: str) -> None:
    async with make_app(model="qwen2.5-0.5b").run_test(size=SIZE) as pilot:
        await settle(pilot)
        pilot.app.theme = name
        await pilot.pause()
        shown = colours(pilot.app)
        assert shown.background != "default"
        badge = next(segment for segment in segments(pilot.app.screen) if "FITS" in segment.text)
        assert badge.style is not None
        assert badge.style.color != badge.style.bgcolor
