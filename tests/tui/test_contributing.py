"""What CONTRIBUTING.md says of a screen: a made-up one, opened by a key of the application and left again."""

from __future__ import annotations

from typing import ClassVar

import pytest
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer, Static

from launcher.tui.app import VramwiseApp
from launcher.tui.screens.help import Help
from launcher.tui.screens.sizing import SizingScreen
from launcher.tui.text import plain

from .conftest import MakeApp, settle

FOREIGN = "a name from elsewhere \x1b[31m[red]"


class MadeUpScreen(Screen[None]):
    """Shows a text that is not ours."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Back", id="made_up.back", tooltip="Back to sizing"),
    ]

    def compose(self) -> ComposeResult:
        yield Static(Text(plain(FOREIGN)), id="made-up")
        yield Footer()


@pytest.mark.parametrize("size", [(60, 20), (120, 40)])
async def test_a_made_up_screen_is_opened_by_a_key_and_left_again(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    def open_it(app: VramwiseApp) -> None:
        app.push_screen(MadeUpScreen())

    monkeypatch.setattr(VramwiseApp, "action_made_up", open_it, raising=False)
    app = make_app()
    app.bind("f2", "made_up", description="Made up")
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        before = app.screen
        assert isinstance(before, SizingScreen)
        sizing = before.sizing
        await pilot.press("f2")
        await settle(pilot)
        assert isinstance(app.screen, MadeUpScreen)
        shown = str(app.screen.query_one("#made-up", Static).render())
        assert "[red]" in shown
        assert "\x1b" not in shown
        await pilot.press("question_mark")
        await settle(pilot)
        assert isinstance(app.screen, Help)
        assert "Back to sizing" in str(app.screen.query_one("#help-keys", Static).content)
        await pilot.press("escape", "escape")
        await settle(pilot)
        assert app.screen is before
        assert before.sizing == sizing
