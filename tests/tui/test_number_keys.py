"""Number keys lead to panels; within a number that is typed, digits edit and letters only hint."""

from __future__ import annotations

from textual.widgets import Input

from planner.base.settings import load_settings, settings_path

from .conftest import MakeApp, settle
from .test_sizing_screen import shown_text


async def test_numbers_lead_to_panels_and_a_letter_within_a_number_is_no_key(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        field = app.screen.query_one("#knob-max_length", Input)
        assert app.focused is field
        # k keeps the card as a setting; as the end of "4k" it does not.
        await pilot.press("4", "k", "a")
        # Not until all is worked out: by then the hint is gone again.
        await pilot.pause()
        assert field.value == "4"
        told = [one.message for one in app._notifications]
        assert told[0].endswith("is a number: enter ends it, then k is a key again")
        assert load_settings().gpu is None
        assert not settings_path().exists()
        await pilot.press("backspace", "8", "1", "9", "2", "enter")
        await settle(pilot)
        assert field.value == "8192"
        # Not typed into, a field leaves letters to the screen.
        app.clear_notifications()
        await pilot.press("up", "p")
        await settle(pilot)
        assert app.focused is field
        assert app.screen.query_one("#pinned").display
        await pilot.press("escape")
        for key, title in (("7", "7 speed against memory"), ("4", "4 speed"), ("1", "learning")):
            await pilot.press(key)
            await settle(pilot)
            assert title in shown_text(pilot) or key == "1", key
        assert app.focused is field
        await pilot.press("escape", "question_mark")
        await settle(pilot)
        assert "1-7" in shown_text(pilot)
        assert "Go to a panel" in shown_text(pilot)
