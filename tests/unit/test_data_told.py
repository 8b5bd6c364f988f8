"""What of the data is not trained is part of the answer: in JSON, on both pages, and nowhere beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.commands import train
from planner.answers.plan import Plan
from planner.data.remembered import estimated_lengths
from planner.text.short import MOST_LINES

Cli = Callable[..., Any]
ASKED = ("plan", "qwen2.5-0.5b", "16GB", "--max-length", "512", "--epochs", "1")
SHORT = {"prompt": "a" * 40, "completion": "b"}
PROMPT_FILLS = {"prompt": "a" * 8000, "completion": "b"}
CUT = {"prompt": "a" * 40, "completion": "b" * 8000}


@pytest.fixture
def lacking(tmp_path: Path) -> Path:
    """32 examples: 3 whose prompt fills 512 tokens, 2 that are cut within, keys that nothing is made of."""
    rows = [{**SHORT, "id": 1}] * 27 + [{**PROMPT_FILLS, "source": "web"}] * 3 + [CUT] * 2
    return written(tmp_path / "lacking.jsonl", rows)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[object, ...]:
    """A machine with a GPU and every model on it, where runs are made but not started; what to give train."""
    pytest.importorskip("trl")
    monkeypatch.setattr(train, "_has_gpu", lambda: True)
    monkeypatch.setattr("launcher.runs.weights.require_weights", lambda *_, **__: None)
    monkeypatch.setattr(train, "_measured_stats", lambda wish: estimated_lengths(wish.data))
    monkeypatch.setattr(train, "_start_and_follow", lambda *_: 0)
    return "--runs", tmp_path / "runs"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(text: str) -> str:
    return " ".join(text.split())


def test_json_has_it_in_fields(cli: Cli, lacking: Path) -> None:
    done = cli(*ASKED, "--data", lacking, "--json")
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)["data"]
    assert (data["untrained_examples"], data["left_out"]) == (3, ["id", "source"])
    assert data["truncated_examples"] == 5
    assert data["notes"] == [
        "3 of 32 examples are not trained, having no token to learn: the prompt of 3 fills max_length 512"
    ]
    told = json.loads(done.out)
    assert Plan.from_dict(told).to_dict() == told
    for name in ("untrained_examples", "left_out", "notes"):
        del told["data"][name]
    assert Plan.from_dict(told).data is not None


def test_the_full_page_has_a_section_of_it(cli: Cli, lacking: Path) -> None:
    out = cli(*ASKED, "--data", lacking, "--full").out
    section = words(out[out.index("\nData\n") :].split("\n\n")[0])
    for part in (
        "examples 32 prompts with completions",
        "5 are cut, losing",
        "not trained 3 of 32 examples are not trained, having no token to learn: the prompt of 3 fills",
        "left out keys of which nothing is made: id, source",
    ):
        assert part in section


def test_the_short_page_has_a_line_of_it_where_there_is_something_to_tell(
    cli: Cli, lacking: Path, tmp_path: Path
) -> None:
    done = cli(*ASKED, "--data", lacking)
    assert done.err == ""
    assert "data 5 of 32 examples are cut; 3 of 32 examples are not trained" in words(done.out)
    assert "; left out: id, source layers" not in words(done.out)
    assert "left out: id, source" in words(done.out)
    whole = cli(*ASKED, "--data", written(tmp_path / "whole.jsonl", [SHORT] * 32))
    assert (whole.code, "\n  data" in whole.out, "left out" in whole.out) == (0, False, False)


def test_many_keys_are_counted_on_the_short_page(cli: Cli, tmp_path: Path) -> None:
    row = {**SHORT, **{f"column{number}": number for number in range(8)}, " ": 8}
    out = words(cli(*ASKED, "--data", written(tmp_path / "wide.jsonl", [row] * 20)).out)
    assert "left out: column0, column1, column2, column3 and 5 more keys" in out


def test_train_tells_it_on_its_page_and_of_the_evaluation_data_beside_it(
    cli: Cli, lacking: Path, tmp_path: Path, nothing_starts: tuple[object, ...]
) -> None:
    asked = ("train", *ASKED[1:], *nothing_starts)
    cut = written(tmp_path / "eval.jsonl", [SHORT] * 20 + [CUT])
    done = cli(*asked, "--data", lacking, "--eval-data", cut)
    assert "data 5 of 32 examples are cut; 3 of 32 examples are not trained" in words(done.out)
    assert "evaluation data: 1 of 21 examples are cut" in done.err
    assert "not trained" not in done.err


def test_train_prints_the_pages_that_plan_prints(
    cli: Cli, lacking: Path, nothing_starts: tuple[object, ...]
) -> None:
    asked = (*ASKED[1:], "--data", lacking)
    full = cli("train", *asked, "--full", *nothing_starts).out
    assert full.rstrip("\n") == cli("plan", *asked, "--full", "--no-longest").out.rstrip("\n")
    short, planned = cli("train", *asked, *nothing_starts).out, cli("plan", *asked, "--no-longest").out
    # A run that begins needs not be told how to begin, and has room for more parts.
    begun = re.sub(r"  train it.*?(?=\n  \S)\n", "", planned, flags=re.DOTALL)
    assert begun != planned
    assert set(begun.splitlines()) <= set(short.splitlines())
    assert len(short.splitlines()) <= MOST_LINES + 1
