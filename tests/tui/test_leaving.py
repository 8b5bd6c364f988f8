"""What is said when the interface is left, and where it can be shown."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from launcher.commands import tui
from launcher.tui import pauses, run_follower, runs
from launcher.tui.app import VramwiseApp
from launcher.tui.widgets.run.line_plot import PlotData, draw
from planner.base.errors import InputError

from . import synthetic
from .conftest import MakeApp, settle
from .test_run_screen import see
from .test_sizing_screen import shown_text


@pytest.fixture(autouse=True)
def collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's collector stays as it is for the tests that follow."""
    monkeypatch.setattr(pauses, "shorten_pauses", lambda: None)


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tui.add_arguments(parser)
    return parser.parse_args([*words, "--gpu", "16GB", "--model", "qwen2.5-0.5b"])


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_that_goes_on_is_named_with_the_command_that_follows_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], alive: bool
) -> None:
    folder = synthetic.half_way(tmp_path / "my run")
    monkeypatch.setenv("TEXTUAL_DRIVER", "served")
    monkeypatch.setattr(VramwiseApp, "run", lambda app: None)
    monkeypatch.setattr(runs, "is_alive", lambda folder: alive)
    if not alive:
        synthetic.append(folder.events, synthetic.end("finished", 240))
    assert tui.run(asked("--run", str(folder.path))) == 0
    said = capsys.readouterr().err
    command = f"vramwise runs follow 'my run' --runs {tmp_path}"
    assert (f"run my run goes on: {command}" in said) is alive


def test_in_a_browser_no_terminal_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[VramwiseApp] = []
    monkeypatch.setattr(VramwiseApp, "run", lambda app: shown.append(app))
    monkeypatch.delenv("TEXTUAL_DRIVER", raising=False)
    with pytest.raises(InputError, match="needs a terminal"):
        tui.run(asked())
    monkeypatch.setenv("TEXTUAL_DRIVER", "textual.drivers.web_driver:WebDriver")
    assert tui.run(asked()) == 0
    assert len(shown) == 1


async def test_a_run_that_is_over_says_where_its_adapter_is_and_offers_no_stop(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_follower, "is_alive", lambda folder: True)
    folder = synthetic.half_way(tmp_path / "r")
    async with make_app(run=folder).run_test(size=(200, 40)) as pilot:
        await see(pilot)
        await settle(pilot)
        assert "Stop" in shown_text(pilot).splitlines()[-1]
        assert "saved     " not in shown_text(pilot)
        folder.adapter.mkdir()
        synthetic.append(folder.events, synthetic.end("finished", 240))
        await see(pilot)
        await settle(pilot)
        assert f"saved     {folder.adapter}" in shown_text(pilot)
        assert "Stop" not in shown_text(pilot).splitlines()[-1]
        await pilot.press("s")
        await settle(pilot)
        assert not folder.stop.exists()


@pytest.mark.parametrize("height", [4, 5, 6, 9])
def test_a_single_value_is_written_once_beside_its_point(height: int) -> None:
    lines = draw(PlotData(points=((1, 3.581),)), 60, height, line="", mark="", muted="").plain.splitlines()
    labelled = [line for line in lines if "3.581" in line]
    assert len(labelled) == 1
    assert any(0x2800 < ord(character) < 0x2900 for character in labelled[0])
