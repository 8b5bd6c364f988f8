"""The frontier as a plot: each point where it lies, the limit drawn, and a cursor that walks along it."""

from __future__ import annotations

from textual.widgets import OptionList

from launcher.tui.widgets.sizing.frontier_plot import HEIGHT, Frontier, FrontierPlot, draw
from planner.answers.plan import FrontierPoint
from planner.setup.training_setup import TrainingSetup

from .conftest import MakeApp, settle
from .test_data import SHOWN
from .test_sizing_screen import screen_of

GIB = 2**30
SETUP = TrainingSetup(model="qwen2.5-0.5b", max_length=512)


def point(gib: float, rate: float, *, fits: bool = True, chosen: bool = False) -> FrontierPoint:
    return FrontierPoint(
        strategy="s",
        setup=SETUP,
        peak_upper_bytes=int(gib * GIB),
        tokens_per_second=rate,
        hours=1 / rate,
        fits=fits,
        chosen=chosen,
    )


def test_points_lie_by_memory_and_speed_and_what_is_too_large_beyond_the_limit() -> None:
    points = (point(10, 100), point(12, 200, chosen=True), point(20, 400, fits=False))
    lines = draw(Frontier(points, 15 * GIB, 0), 69, SHOWN).plain.split("\n")
    assert len(lines) == HEIGHT
    assert all(len(line) == 69 for line in lines)
    signs = {
        sign: (row, line.index(sign)) for row, line in enumerate(lines) for sign in "◆★✘" if sign in line
    }
    limit = lines[1].index("┊")
    assert signs["◆"] == (HEIGHT - 2, 9)
    assert signs["✘"] == (0, 68)
    assert signs["◆"][1] < signs["★"][1] < limit < signs["✘"][1]
    assert "15.0 usable" in lines[-1]
    assert lines[0].startswith("     400│")
    assert lines[HEIGHT - 2].startswith("     100│")
    # One point alone is no frontier, and a narrow window has the list.
    assert draw(Frontier(points[:1], 15 * GIB, 0), 69, SHOWN).plain == ""
    assert draw(Frontier(points, 15 * GIB, 0), 15, SHOWN).plain == ""


async def test_the_setup_follows_the_cursor_along_the_frontier(make_app: MakeApp) -> None:
    async with make_app(automatic=True).run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        screen = screen_of(pilot)
        before = screen.sizing
        points = screen.query_one("#frontier-list", OptionList)
        plot = screen.query_one(FrontierPlot)
        assert before is not None
        assert plot.display
        at = plot.data.marked
        assert at is not None
        assert plot.data.points[at].setup == before.setup
        points.focus()
        await pilot.press("left")
        await settle(pilot)
        now = screen.sizing
        assert now is not None
        assert now.memory.peak_upper_bytes < before.memory.peak_upper_bytes
        assert plot.data.points[plot.data.marked or 0].setup == now.setup
        # It walks on from there, and each step is taken back.
        await pilot.press("right")
        await settle(pilot)
        assert screen.sizing.setup == before.setup  # type: ignore[union-attr]
        await pilot.press("ctrl+z", "ctrl+z")
        await settle(pilot)
        assert screen.sizing.setup == before.setup  # type: ignore[union-attr]
