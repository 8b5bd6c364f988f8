"""Data, display and price on the sizing screen: what a plan says of the same, and moved by every knob."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.text import Text
from textual.widgets import Input, Static

from launcher.tui import cards
from launcher.tui.cards import card_from_text
from launcher.tui.command_line import plan_command, request_of
from launcher.tui.dataset import UnreadableDataError, completions, read_dataset
from launcher.tui.screens.data_picker import DataPicker
from launcher.tui.themes import Colours
from launcher.tui.widgets.sizing.data_panel import HEIGHT, DataPanel, histogram
from planner.data.lengths import DatasetStats
from planner.gpus.spec import DISPLAY_BYTES
from planner.planning.make_plan import make_plan
from planner.text.figures import dollars

from .conftest import MakeApp, settle
from .test_sizing_screen import screen_of, shown_text, type_into

SHOWN = Colours(
    muted="#000001",
    primary="#000002",
    success="#000003",
    warning="#000004",
    error="#000005",
    accent="#000006",
    background="#000007",
    panel="#000008",
    track="#000009",
)


def write(path: Path, lengths: Iterable[int]) -> Path:
    rows = ({"prompt": "p" * 4, "completion": "c" * 4 * length} for length in lengths)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def test_data_display_and_price_move_with_the_knobs_and_are_those_of_plan(
    make_app: MakeApp, tmp_path: Path
) -> None:
    data = write(tmp_path / "chats.jsonl", [*range(100, 600, 5), 5000, 9000])
    async with make_app(model="qwen2.5-0.5b", gpu="12GB").run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        assert "d picks a file" in shown_text(pilot)
        before = screen_of(pilot).sizing
        await pilot.press("d")
        pilot.app.screen.query_one("#filter", Input).value = f"{tmp_path}/"
        await settle(pilot)
        await pilot.press("enter")
        await settle(pilot)
        screen = screen_of(pilot)
        sizing = screen.sizing
        assert sizing is not None
        assert sizing.wishes.data is not None
        assert sizing.wishes.data.path == str(data)
        plan = make_plan(request_of(sizing), whole=False)
        assert sizing.run is not None
        assert (sizing.run.duration, sizing.run.schedule) == (plan.duration, plan.schedule)
        assert (sizing.run.data, sizing.memory) == (plan.data, plan.memory)
        assert "chats.jsonl" in shown_text(pilot)
        # A Static lays the whole screen out anew whenever its text changes.
        assert not screen.query("#headline Static")
        assert "2 of 102 cut" in shown_text(pilot)
        assert f"{plan.duration.steps:,} of 16 examples, 3 epochs" in shown_text(pilot)  # type: ignore[union-attr]
        # A longer length cuts less.
        await type_into(pilot, "max_length", "8192")
        assert "1 of 102 cut" in shown_text(pilot)
        # A display takes memory, and a price of one's own is counted with.
        assert sizing.card.usable_bytes == before.card.usable_bytes  # type: ignore[union-attr]
        screen.query_one("#knob-display").focus()
        await pilot.press("right", "down", "1", ".", "5", "down", "down", "3", "0")
        await settle(pilot)
        after = screen_of(pilot).sizing
        assert after is not None
        assert after.run is not None
        assert after.card.usable_bytes == sizing.card.usable_bytes - DISPLAY_BYTES
        assert "held by a display" in shown_text(pilot)
        assert after.wishes.num_train_epochs == 30
        plan = make_plan(request_of(after), whole=False)
        assert after.run.duration == plan.duration
        assert plan.duration is not None
        assert plan.duration.usd is not None
        assert dollars(plan.duration.usd) in shown_text(pilot)
        assert "at $1.5 a GPU-hour" in str(screen.query_one(DataPanel).render())
        command = plan_command(after)
        assert f"--display --data {data} --epochs 30" in command
        assert "--price-per-hour 1.5" in command
        # A price that is none is said where it was typed.
        screen.query_one("#knob-price", Input).value = "9e9"
        await settle(pilot)
        assert "from 0 to 1e+06" in str(screen.query_one("#error-price", Static).content)
        screen.query_one("#knob-price", Input).value = ""
        await pilot.press("escape", "d", "ctrl+d")
        await settle(pilot)
        assert screen_of(pilot).sizing.wishes.data is None  # type: ignore[union-attr]
        assert "d picks a file" in shown_text(pilot)


async def test_paths_are_completed_and_mistakes_told_with_their_lines(
    make_app: MakeApp, tmp_path: Path
) -> None:
    (tmp_path / "deep").mkdir()
    bad = tmp_path / "deep" / "bad.jsonl"
    good = {"prompt": "a", "completion": "b"}
    rows: list[object] = [good, {"prompt": 1, "completion": "b"}, good, [], {"text": "x"}]
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    async with make_app(model="qwen2.5-0.5b").run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("d")
        pilot.app.screen.query_one("#filter", Input).value = f"{tmp_path}/de"
        await settle(pilot)
        await pilot.press("tab")
        await settle(pilot)
        assert pilot.app.screen.query_one("#filter", Input).value == f"{tmp_path}/deep/"
        await pilot.press("enter")
        await settle(pilot)
        assert isinstance(pilot.app.screen, DataPicker)
        told = str(pilot.app.screen.query_one("#data-mistakes", Static).content)
        for place in ("line 2", "line 4", "line 5", "line 6: broken JSON"):
            assert place in told
        await pilot.press("escape")
        await settle(pilot)
        assert screen_of(pilot).sizing.wishes.data is None  # type: ignore[union-attr]


async def test_the_screen_opens_on_what_plan_chooses_for_data_that_is_named(
    make_app: MakeApp, tmp_path: Path
) -> None:
    data = write(tmp_path / "chats.jsonl", range(100, 200))
    app = make_app(model="qwen2.5-0.5b", automatic=True)
    app._first._begins_with = str(data)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        sizing = screen_of(pilot).sizing
        assert sizing is not None
        plan = make_plan(request_of(sizing).without(*request_of(sizing).fixed), whole=False)
        assert sizing.setup == plan.setup
        assert sizing.memory == plan.memory


async def test_another_card_is_sized_in_its_own_type_and_refuses_bfloat16_as_plan_does(
    make_app: MakeApp,
) -> None:
    async with make_app(model="qwen2.5-0.5b").run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("g", *"t4", "enter")
        await settle(pilot)
        assert screen_of(pilot).sizing.setup.dtype == "float16"  # type: ignore[union-attr]
        assert screen_of(pilot).sizing.card.spec.id == "t4"  # type: ignore[union-attr]
        screen_of(pilot).query_one("#knob-dtype").value = "bfloat16"  # type: ignore[attr-defined]
        await settle(pilot)
        told = str(screen_of(pilot).query_one("#error-dtype", Static).content)
        assert told.startswith("dtype=bfloat16 needs compute capability 8.0")


def test_what_holds_memory_of_a_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card_from_text("12GB").held == ""
    assert card_from_text("12GB", display=True).held == "1.2 GiB held by a display"
    shown = cards.attached(card_from_text("12GB"), display=True)
    assert shown.target == card_from_text("12GB", display=True).target
    assert cards.attached(shown, display=False) == card_from_text("12GB")


@pytest.mark.parametrize("cut_at", [10, 100, 1000, 50_000])
def test_the_histogram_has_every_example_and_the_cut_where_it_lies(cut_at: int) -> None:
    lengths = [10] * 3 + list(range(20, 2000, 7))
    stats = DatasetStats.from_lengths(
        lengths, loss_tokens=1, loss_on="all", data_format="text", estimated=False
    )
    drawn = histogram(stats, cut_at, 60, SHOWN)
    lines = drawn.plain.split("\n")
    assert len(lines) == HEIGHT + 1
    assert all(len(line) == 60 for line in lines)
    mark = lines[0].index("┃")
    bars = lines[HEIGHT - 1]

    def colours_of(part: Text) -> set[str]:
        return {str(span.style) for span in part.spans}

    bottom = drawn.split("\n")[HEIGHT - 1]
    kept, cut = bottom[:mark], bottom[mark + 1 :]
    assert f"{cut_at:,} cut" in lines[-1]
    assert colours_of(kept) <= {SHOWN.primary}
    assert colours_of(cut) <= {SHOWN.warning}
    assert (bars[0] != " ") or mark == 0
    assert (bars[mark + 1 :].strip() != "") == (cut_at < max(lengths) - 100)


def test_only_folders_and_files_of_data_are_offered(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.py", ".hidden.csv"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    start = f"{tmp_path}/"
    assert completions(start) == (f"{start}a.jsonl", f"{start}b.jsonl.gz", f"{start}folder/")
    assert completions(f"{start}b") == (f"{start}b.jsonl.gz",)
    assert completions(f"{start}nowhere/") == ()
    with pytest.raises(UnreadableDataError, match="no examples"):
        read_dataset(f"{start}a.jsonl")
