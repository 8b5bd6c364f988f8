"""What keeps the sizing screen's answer within its 50 ms; benchmarks/tui_latency.py takes the time."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.style import Style
from textual.widgets import Select

from launcher.tui.widgets.sizing.legend import Legend
from launcher.tui.widgets.sizing.memory_bar import BarData, BarPart, MemoryBar, bar_row
from launcher.tui.widgets.sizing.phase_table import PhaseTable

from .conftest import MakeApp, settle

LATER = "import launcher.tui.app, textual.constants as c; print(c.MAX_FPS)"
UNCERTAIN, FREE, MARK = "#000001", "#000002", "#000003"


@pytest.mark.parametrize(("given_frames", "frames"), [(None, "120"), ("30", "30")])
def test_textual_paints_a_change_within_two_frames_of_8_ms(given_frames: str | None, frames: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TEXTUAL_FPS"}
    if given_frames is not None:
        environment["TEXTUAL_FPS"] = given_frames
    done = subprocess.run(
        [sys.executable, "-c", LATER],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    assert done.stdout.strip() == frames


async def test_a_setup_with_another_peak_and_other_parts_lays_nothing_out_anew(make_app: MakeApp) -> None:
    async with make_app().run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        table, bar = pilot.app.screen.query_one(PhaseTable), pilot.app.screen.query_one(MemoryBar)
        before, place, drawn = table.render().plain, table.region, bar.data
        pilot.app.screen.query_one("#knob-gradient_checkpointing", Select).value = "off"
        await settle(pilot)
        assert table.render().plain != before
        assert bar.data != drawn
        assert table.region == place


async def test_parts_that_are_added_are_all_listed_at_once(make_app: MakeApp) -> None:
    async with make_app(method="full").run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        legend = pilot.app.screen.query_one(Legend)
        before = len(legend.render().plain.splitlines())
        pilot.app.screen.query_one("#knob-method", Select).value = "qlora"
        await pilot.pause()
        lines = len(legend.render().plain.splitlines())
        assert lines > before
        assert legend.content_size.height == lines


def colour_at(data: BarData, half_cell: int, width: int) -> str | None:
    """The colour of the part in which the middle of a half cell lies, looked up by itself."""
    start = 0
    for part in data.parts:
        start += part.size_bytes
        if (2 * half_cell + 1) * data.scale_bytes < 4 * width * start:
            return part.colour
    return None


def cell_by_cell(data: BarData, width: int) -> list[tuple[str, Style]]:
    """What each cell shows by the rule in words: two colours, or a sign for the limit or what is unsure."""
    cells = []
    for cell in range(width):
        left, right = (colour_at(data, 2 * cell + half, width) for half in (0, 1))
        is_limit = cell == min(width - 1, int(data.usable_bytes / data.scale_bytes * width))
        if is_limit and data.usable_bytes < data.scale_bytes:
            cells.append(("┃", Style(color=MARK, bgcolor=left or FREE, bold=True)))
        elif left is right is None and (cell + 0.5) / width * data.scale_bytes <= max(
            data.upper_bytes, data.total_bytes
        ):
            cells.append(("▒", Style(color=UNCERTAIN, bgcolor=FREE)))
        elif left == right:
            cells.append((" ", Style(bgcolor=left or FREE)))
        else:
            cells.append(("▌", Style(color=left or FREE, bgcolor=right or FREE)))
    return cells


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**10), max_size=9),
    upper=st.integers(0, 10**11),
    usable=st.integers(1, 10**11),
    width=st.integers(10, 200),
)
def test_the_bar_shows_each_byte_where_it_lies_in_few_stretches(
    sizes: list[int], upper: int, usable: int, width: int
) -> None:
    parts = tuple(BarPart(size, f"#0000{index:02}") for index, size in enumerate(sizes, 10))
    data = BarData(parts=parts, peak_bytes=sum(sizes), upper_bytes=upper, usable_bytes=usable)
    row = bar_row(data, width, uncertain=UNCERTAIN, free=FREE, mark=MARK)
    cells = cell_by_cell(data, width)
    assert row.plain == "".join(character for character, _ in cells)
    shown = [style for span in row.spans for style in [span.style] * (span.end - span.start)]
    assert shown == [style for _, style in cells]
    assert len(row.spans) == len(list(groupby(cells)))
