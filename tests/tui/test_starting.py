"""What becomes of a wish for a run that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from textual.widgets import Input, Static

from launcher.commands import train
from launcher.tui import starting
from launcher.tui.screens.start_run import FIELDS, RunWish, StartRun, read_wish
from launcher.tui.screens.waiting import Waiting
from launcher.tui.sizing import Sizing
from planner.base.errors import FieldError, InputError
from planner.commands.program import Parser
from planner.setup import defaults

from .conftest import MakeApp, settle
from .test_sizing_screen import shown_text


async def test_a_gpu_that_is_taken_is_waited_for_in_sight(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason: list[str | None] = ["the run /r trains on GPU x"]
    tried: list[RunWish] = []

    def start(answer: Sizing, wish: RunWish, *, allow_download: bool) -> None:
        tried.append(wish)
        if reason[0] is not None:
            raise starting.NotFreeError(reason[0], range(2), 5)
        raise InputError("it was free")

    asked: list[tuple[int, int | None]] = []

    def in_the_way(position: int, need_bytes: int | None) -> str | None:
        asked.append((position, need_bytes))
        # The first of two GPUs is free all the while.
        return None if position == 0 else reason[0]

    monkeypatch.setattr(starting, "refuse_what_cannot_start", lambda answer: None)
    monkeypatch.setattr(starting, "start", start)
    monkeypatch.setattr(starting, "in_the_way", in_the_way)
    monkeypatch.setattr("launcher.tui.screens.waiting.POLL_SECONDS", 0.02)
    (tmp_path / "data.jsonl").write_text("{}\n")
    async with make_app(model="qwen2.5-0.5b").run_test(size=(80, 24)) as pilot:
        await settle(pilot)

        async def until(condition: Callable[[], bool]) -> None:
            for _ in range(3000):
                if condition():
                    return
                await pilot.pause(0.02)
            raise AssertionError("it did not come in time")

        await pilot.press("t")
        await settle(pilot)
        pilot.app.screen.query_one("#start-data", Input).value = str(tmp_path / "data.jsonl")
        await pilot.press("ctrl+s")
        await until(lambda: isinstance(pilot.app.screen, Waiting) and len(asked) > 1)
        assert "The run /r trains on GPU x" in shown_text(pilot)
        reason[0] = "3.00 GiB are missing on GPU 0"
        await until(lambda: "3.00 GiB are missing on GPU 0" in shown_text(pilot))
        # Back: nothing was started, and the form is as it was filled.
        await pilot.press("escape")
        await settle(pilot)
        assert isinstance(pilot.app.screen, StartRun)
        assert pilot.app.screen.query_one("#start-data", Input).value == str(tmp_path / "data.jsonl")
        assert len(tried) == 1
        await pilot.press("ctrl+s")
        await until(lambda: isinstance(pilot.app.screen, Waiting))
        reason[0] = None
        await until(lambda: "it was free" in shown_text(pilot))
        assert isinstance(pilot.app.screen, StartRun)
        assert len(tried) == 3
        assert set(asked) == {(0, 5), (1, 5)}


async def test_the_form_comes_back_as_it_was_filled_with_the_reason(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[RunWish] = []

    def refuses(answer: Sizing, wish: RunWish, *, allow_download: bool) -> None:
        assert not allow_download
        tried.append(wish)
        raise InputError("row 3 is no example")

    monkeypatch.setattr(starting, "refuse_what_cannot_start", lambda answer: None)
    monkeypatch.setattr(starting, "start", refuses)
    (tmp_path / "data.jsonl").write_text("{}\n")
    rows = [{"prompt": "p" * 40, "completion": "c" * 40 * length} for length in range(1, 40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filled = {
        "data": str(tmp_path / "data.jsonl"),
        "model": "/models/mine",
        "epochs": "2.5",
        "steps": "",
        "name": "mine",
        "eval": "0.05",
        "rate": "0.0003",
        "seed": "7",
        "assistant": "assistant",
    }
    async with make_app(model="qwen2.5-0.5b").run_test(size=(80, 24), notifications=True) as pilot:
        await settle(pilot)
        await pilot.press("t")
        await settle(pilot)
        for name, value in filled.items():
            pilot.app.screen.query_one(f"#start-{name}", Input).value = value
        await settle(pilot)
        told = str(pilot.app.screen.query_one("#start-foreseen", Static).content)
        assert "of 16 examples, 2.5 epochs; time " in told
        assert "price not known" in told
        assert "disk " in told
        await pilot.press("ctrl+s")
        await settle(pilot)
        assert isinstance(pilot.app.screen, StartRun)
        assert "row 3 is no example" in shown_text(pilot)
        shown = {name: pilot.app.screen.query_one(f"#start-{name}", Input).value for name in filled}
        assert shown == filled
        await pilot.press("ctrl+s")
        await settle(pilot)
        assert len(tried) == 2
        assert tried[0] == tried[1]
        assert (tried[0].name, tried[0].eval_split, tried[0].learning_rate) == ("mine", 0.05, 0.0003)
        assert (tried[0].seed, tried[0].assistant_only_loss) == (7, True)


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("name", "../up", "printable characters"),
        ("eval", "1.5", "a share between 0 and 1"),
        ("eval", "nowhere.jsonl", "a file that exists"),
        ("rate", "much", "a number"),
        ("seed", "-1", "a whole number"),
        ("assistant", "user", "all or assistant"),
    ],
)
def test_what_the_form_does_not_take_is_said_of_its_field(
    tmp_path: Path, field: str, text: str, said: str
) -> None:
    (tmp_path / "data.jsonl").touch()
    texts = {name: "" for name, *_ in FIELDS}
    texts |= {"data": str(tmp_path / "data.jsonl"), "model": "m", "runs": str(tmp_path), "epochs": "3"}
    assert read_wish(texts).num_train_epochs == 3
    with pytest.raises(FieldError, match=said) as told:
        read_wish({**texts, field: text})
    assert told.value.field == field


def test_the_form_s_usual_values_are_the_command_s(tmp_path: Path) -> None:
    """What is left empty is what `train` takes: both hand on what stands for the usual."""
    (tmp_path / "data.jsonl").touch()
    form = StartRun(title="", model_source="m", data=str(tmp_path / "data.jsonl"), runs=str(tmp_path))
    wish = read_wish(form.values)
    parser = Parser()
    train.add_arguments(parser)
    args = parser.parse_args(["--model", "m"])
    assert wish.num_train_epochs == defaults.EPOCHS
    assert args.epochs is None
    told = (args.name, args.eval_data, args.eval_split, args.learning_rate, args.seed, args.max_steps)
    mine = (wish.name, wish.eval_data, wish.eval_split, wish.learning_rate, wish.seed, wish.max_steps)
    assert mine == told
    assert wish.assistant_only_loss == args.assistant_only_loss


REASON = (
    "the run /data/somebody/share/vramwise/runs/20261201-071533-llama-3.1-8b-instruct trains on GPU "
    "GPU-4f1c2a3b-9d8e-7f6a-5b4c-3d2e1f0a9b8c since 2026-12-01 07:15, process 12345"
)


@pytest.mark.parametrize("size", [(80, 24), (40, 12)])
async def test_the_way_back_is_in_sight_however_small_the_terminal_is(
    make_app: MakeApp, size: tuple[int, int]
) -> None:
    async with make_app(model="qwen2.5-0.5b").run_test(size=size) as pilot:
        await settle(pilot)
        pilot.app.push_screen(Waiting(REASON, lambda: REASON))
        await pilot.pause()
        screen = pilot.app.screen
        for shown in ("#dialog-title", "#back"):
            widget = screen.query_one(shown)
            assert widget.region.height == 1
            assert screen.region.contains_region(widget.region)
        text = shown_text(pilot)
        assert "Waiting for the GPU" in text
        assert "Training starts" in text
        # All of it can be read.
        for _ in range(9):
            await pilot.press("down")
        await pilot.pause()
        assert "process 12345" in shown_text(pilot)
        await pilot.press("escape")
