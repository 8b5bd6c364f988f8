"""A pinned setup beside the present one, and where each number comes from."""

from __future__ import annotations

from textual.widgets import Static

from launcher.tui.screens.help import Help
from launcher.tui.widgets.sizing.legend import Legend
from launcher.tui.widgets.sizing.phase_table import PhaseTable
from launcher.tui.widgets.text_line import TextLine

from .conftest import MakeApp, settle
from .test_sizing_screen import screen_of, shown_text


async def test_every_figure_shows_how_it_differs_from_what_is_pinned_and_says_where_it_comes_from(
    make_app: MakeApp,
) -> None:
    async with make_app(gpu="24GB").run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        screen = screen_of(pilot)
        first = screen.sizing
        assert first is not None
        assert "100%" in str(screen.query_one(Legend).render())
        await pilot.press("p", "right")
        await settle(pilot)
        now = screen.sizing
        assert now is not None
        more = (now.memory.process_bytes - first.memory.process_bytes) / 2**30
        assert more > 0.1
        assert f"+{more:.2f} GiB" in str(screen.query_one(Legend).render()).splitlines()[-1]
        assert f"+{more:.2f} GiB" in str(screen.query_one(PhaseTable).render())
        rates = [one.step.tokens_per_second for one in (now, first)]  # type: ignore[union-attr]
        line = screen.query_one("#pinned", TextLine).text.plain
        assert line.startswith(f"pinned at most {first.memory.peak_upper_bytes / 2**30:.1f} GiB (+")
        assert f"tokens/s ({rates[0] / rates[1] - 1:+.0%})" in line
        assert "qwen2.5-14b, 24GB, 4,096 tokens" in line
        # Back at what is pinned nothing differs; then it is let go of.
        await pilot.press("left")
        await settle(pilot)
        assert "+0%" in screen.query_one("#pinned", TextLine).text.plain
        await pilot.press("p")
        assert not screen.query_one("#pinned", TextLine).display
        assert "100%" in str(screen.query_one(Legend).render())
        await pilot.press("question_mark")
        await settle(pilot)
        assert isinstance(pilot.app.screen, Help)
        keys = str(pilot.app.screen.query_one("#help-keys", Static).content)
        assert keys.index("Pick another model") < keys.index("Leave; runs go on")
        told = str(pilot.app.screen.query_one("#help-numbers", Static).content)
        for part in first.memory.components:
            assert not part.size_bytes or part.origin in told
        assert first.step is not None
        assert first.step.basis in told
        assert "Akash" in told
        await pilot.press(*"price")
        await settle(pilot)
        told = str(pilot.app.screen.query_one("#help-numbers", Static).content)
        assert "Akash" in told
        assert "half a byte" not in told
        await pilot.press("escape")
        assert "Keys" not in shown_text(pilot)
