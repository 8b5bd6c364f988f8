"""Every theme that the palette offers, on every screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from rich.segment import Segment
from textual.color import Color, ColorParseError
from textual.pilot import Pilot
from textual.screen import Screen
from textual.theme import BUILTIN_THEMES, Theme

from launcher.tui.screens.sizing import SizingScreen
from launcher.tui.themes import DARK, LEAST_CONTRAST, LIGHT, Colours, colours, completed, contrast
from launcher.tui.widgets.sizing.knob_form import KnobForm

from .conftest import MakeApp, settle
from .every_screen import VIEWS, back, fixed

__all__ = ["fixed"]

THEMES = {**BUILTIN_THEMES, DARK.name: DARK, LIGHT.name: LIGHT}
KINDS = {(theme.ansi, theme.dark): name for name, theme in THEMES.items()}
"""A theme of each kind: of the terminal's colours or of its own, dark or light. Those of one kind differ in
nothing but which colours they have."""
SIZE = (80, 24)
Pressed = Sequence[str]


def segments(screen: Screen[object]) -> list[Segment]:
    """All that a screen shows."""
    return [segment for strip in screen._compositor.render_strips() for segment in strip]


def text_of(screen: Screen[object]) -> str:
    return "".join(segment.text for segment in segments(screen))


def used(pilot: Pilot[None]) -> set[str]:
    """Colours of the texts that are on the screen."""
    styles = [segment.style for segment in segments(pilot.app.screen) if segment.style is not None]
    return {style.color.triplet.hex for style in styles if style.color is not None and style.color.triplet}


async def press(pilot: Pilot[None], keys: Pressed) -> None:
    await pilot.press(*keys)
    await settle(pilot)


async def goes_through(pilot: Pilot[None], themes: Iterable[str], place: str) -> None:
    """Shows themes one after the other; nothing stays in the muted colour of the one before."""
    before = colours(pilot.app).muted.lower()
    for theme in themes:
        pilot.app.theme = theme
        await pilot.pause()
        assert text_of(pilot.app.screen).strip(), (place, theme)
        muted = colours(pilot.app).muted.lower()
        if before not in {value.lower() for value in pilot.app.theme_variables.values()}:
            assert before not in used(pilot), (place, theme)
        before = muted


def the_verdict_can_be_read(pilot: Pilot[None]) -> None:
    shown = colours(pilot.app)
    assert shown.background != "default"
    badge = next(segment for segment in segments(pilot.app.screen) if "FITS" in segment.text)
    assert badge.style is not None
    assert badge.style.color != badge.style.bgcolor, pilot.app.theme


@pytest.mark.slow
@pytest.mark.usefixtures("fixed")
async def test_every_theme_is_shown_and_one_of_each_kind_on_every_screen(make_app: MakeApp) -> None:
    *views, last = VIEWS
    # Of other screens than sizing one state has all that there is to colour.
    shown = [view for view in views if not view.once or view.screen is SizingScreen]
    async with make_app().run_test(size=SIZE) as pilot:
        pilot.app._runs_root = Path("runs")  # type: ignore[attr-defined]
        await settle(pilot)
        assert set(pilot.app.available_themes) == set(THEMES)
        start = pilot.app.screen.sizing.setup  # type: ignore[attr-defined]
        texts = []
        for view in shown:
            await view.open(pilot)
            texts.append(text_of(pilot.app.screen))
            if view.name == "sizing":
                for theme in KINDS.values():
                    await goes_through(pilot, [theme], view.name)
                    the_verdict_can_be_read(pilot)
            else:
                await goes_through(pilot, KINDS.values(), view.name)
            await back(pilot, start)
        assert len(set(texts)) == len(shown)
        await last.open(pilot)
        # Most of what lies beneath would be restyled in vain.
        for beneath in pilot.app.screen_stack[:-1]:
            await beneath.query(KnobForm).remove()
        await goes_through(pilot, THEMES, last.name)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_a_theme_has_the_colours_that_its_kind_has(theme: Theme) -> None:
    """So that what one of each kind shows, all can."""

    def found(theme: Theme) -> dict[str, str]:
        return {**completed(theme, theme.to_color_system().generate()), **theme.variables}

    def kind(value: str) -> str:
        try:
            return "terminal" if Color.parse(value).ansi is not None else "colour"
        except ColorParseError:
            return "no colour"

    mine, others = found(theme), found(THEMES[KINDS[theme.ansi, theme.dark]])
    for field in fields(Colours):
        assert kind(mine[field.name]) == kind(others[field.name]) != "no colour", field.name


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
