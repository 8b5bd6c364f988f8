"""Settings: what `config` keeps is taken where a command is not told, and a damaged file is one line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from launcher.runs.folder import default_root
from planner.base.errors import InputError
from planner.base.settings import (
    Session,
    change_setting,
    keep_session,
    load_session,
    load_settings,
    settings_path,
)
from planner.gpus.spec import DISPLAY_BYTES

Cli = Callable[..., Any]
PLAN = ("plan", "--model", "qwen2.5-0.5b", "--max-length", "512", "--json")


def test_what_is_kept_is_what_commands_take_where_they_are_not_told(cli: Cli) -> None:
    assert cli("config", "path").out.strip() == str(settings_path())
    for name, value in (("gpu", "12GB"), ("display", "on"), ("price_per_hour", "0.5"), ("runs", "/my runs")):
        assert cli("config", "set", name, value).code == 0
    assert cli("config", "get", "display").out == "on\n"
    assert "12GB" in cli("config").out
    mine = json.loads(cli(*PLAN).out)
    told = json.loads(cli(*PLAN, "--gpu", "12GB", "--display", "--price-per-hour", "0.5").out)
    assert mine == told
    assert mine["gpu"]["held_bytes"] == DISPLAY_BYTES
    # Display and price are of that card alone.
    other = json.loads(cli(*PLAN, "--gpu", "16GB").out)
    assert other["gpu"]["held_bytes"] == 0
    assert other["duration"]["usd"] is None
    assert str(default_root()) == "/my runs"
    assert cli("config", "unset", "runs").code == 0
    assert default_root().name == "runs"
    assert cli("config", "get", "runs").code == 1
    assert tomllib.loads(settings_path().read_text()) == {
        "gpu": "12GB",
        "display": True,
        "price_per_hour": 0.5,
    }


def test_the_session_is_kept_beside_the_settings_and_read_by_no_command() -> None:
    change_setting("theme", 'a "quoted" ünï\\theme')
    keep_session(Session(model="/models/mine"))
    assert load_session() == Session(model="/models/mine")
    change_setting("gpu", "16GB")
    assert load_settings().theme == 'a "quoted" ünï\\theme'
    assert load_session().model == "/models/mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu = [", "config.toml: "),
        ("colour = 'red'", "unknown setting 'colour'"),
        ("display = 'maybe'", "display"),
        ("price_per_hour = -1", "price_per_hour"),
        ("gpu = 7", "gpu"),
        ("session = 1", "[session]"),
    ],
)
def test_a_file_that_holds_no_settings_is_one_line(cli: Cli, text: str, said: str) -> None:
    settings_path().parent.mkdir(parents=True, exist_ok=True)
    settings_path().write_text(text + "\n")
    for command in (PLAN, ("config", "list"), ("runs",)):
        done = cli(*command)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert said in done.err
        assert str(settings_path()) in done.err
    with pytest.raises(InputError):
        change_setting("theme", "nord")
    assert settings_path().read_text() == text + "\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("set", "gpu", "17GB"), "one of the sizes"),
        (("set", "price_per_hour", "much"), "price_per_hour"),
        (("set", "colour", "red"), "unknown setting"),
        (("get", "colour"), "unknown setting"),
        (("set", "gpu"), "a name and a value"),
        (("list", "gpu"), "takes no name"),
    ],
)
def test_what_is_no_setting_is_not_kept(cli: Cli, words: tuple[str, ...], said: str) -> None:
    done = cli("config", *words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err
    assert not settings_path().exists()
