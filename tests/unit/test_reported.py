"""Inputs and figures that people reported, each as it was given, through the command that they gave it to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.tui.cards import card_from_text
from launcher.tui.screens.sizing_parts import model_rows
from launcher.tui.sizing import size_up
from launcher.tui.widgets.sizing.headline import question
from planner.data.reader import read_training_data
from planner.models.catalog import list_models, resolve_model
from planner.setup.training_setup import TrainingSetup

Cli = Callable[..., Any]
ASKED = ("plan", "qwen2.5-0.5b", "16GB", "--json", "--data")
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
HALF = "\ud83d"
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refused(cli: Cli, *arguments: object) -> str:
    done = cli(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
    return str(done.err)


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "2+2=", "completion": " 5", "label": False}, "line 1: label: answers marked as good and"),
        (
            {"prompt": "2+2=", "completion": " 4", "label": True},
            "keep the rows with true and leave label out",
        ),
        (
            {"messages": [{**USER, "content": "<image>what?"}, ANSWER], "images": ["a.png"]},
            "line 1: there is no image",
        ),
        ({"text": HALF}, "line 1: text holds half of a character at character 1 (\\ud83d)"),
        (
            {"messages": [{**USER, "content": f"a {HALF}"}, ANSWER]},
            "line 1: message 1: content holds half of a character at character 3",
        ),
        ({"prompt": HALF, "completion": "x"}, "line 1: prompt holds half of a character at character 1"),
        ({"prompt": "x", "completion": HALF}, "line 1: completion holds half of a character at character 1"),
        (
            {"messages": [USER, {**ANSWER, "thinking": HALF}]},
            "line 1: message 2: thinking holds half of a character at character 1",
        ),
    ],
)
def test_a_row_that_would_be_trained_wrong_is_refused_by_its_key_and_place(
    row: dict[str, Any], said: str, cli: Cli, tmp_path: Path
) -> None:
    path = written(tmp_path / "data.jsonl", json.dumps(row) + "\n")
    assert said in refused(cli, *ASKED, path)


@pytest.mark.parametrize(
    ("row", "used"),
    [
        ({"messages": [USER, {**ANSWER, "reasoning_content": "two and two"}]}, "two and two"),
        ({"messages": [USER, {**ANSWER, "thinking": "two and two"}]}, "two and two"),
        ({"messages": [USER, ANSWER], "tools": [FUNCTION]}, "'name': 'f'"),
        (
            {
                "instruction": "and times three?",
                "output": "12",
                "history": [["2+2?", "4"]],
                "system": "You count.",
            },
            "You count.",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": []}]}, "content='4'"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Oh"}]}, "'Oh'"),
        ({"conversations": [USER, ANSWER]}, "content='4'"),
        ({"prompt": [USER], "completion": [ANSWER]}, "completion_from=1"),
    ],
)
def test_a_row_that_was_trained_without_a_key_or_refused_is_read_whole(
    row: dict[str, Any], used: str, tmp_path: Path
) -> None:
    data = read_training_data(written(tmp_path / "data.jsonl", json.dumps(row) + "\n"))
    assert used in repr(data.examples)
    assert data.left_out == ()


def test_sharegpt_and_parquet_are_planned_as_chats(cli: Cli, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    turns = [{"from": "human", "value": "Hi " * 50}, {"from": "gpt", "value": "Hello " * 50}]
    sharegpt = written(tmp_path / "chats.json", json.dumps([{"conversations": turns}] * 20))
    spoken = [{"role": "user", "content": "Hi " * 50}, {"role": "assistant", "content": "Hello " * 50}]
    pq.write_table(pa.Table.from_pylist([{"messages": spoken}] * 20), tmp_path / "chats.parquet")
    found = [json.loads(cli(*ASKED, path).out)["data"] for path in (sharegpt, tmp_path / "chats.parquet")]
    for data in found:
        assert (data["format"], data["examples"], data["longest"]) == ("messages", 20, 123)
        assert (data["left_out"], data["notes"], data["untrained_examples"]) == ([], [], 0)


def test_files_with_nothing_wrong_are_planned(cli: Cli, tmp_path: Path) -> None:
    lines = written(tmp_path / "lines.json", '{"text": "abcd"}\n' * 20)
    assert json.loads(cli(*ASKED, lines).out)["data"]["examples"] == 20
    table = written(tmp_path / "long.csv", "text\n" + "a" * 200_000 + "\n")
    assert json.loads(cli(*ASKED, table, "--max-length", "512").out)["data"]["longest"] == 50_001


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "line 2: broken JSON at column 10: Expecting value"),
        ("foreign.csv", "a,b\n1,2\n", "line 2: expected messages, conversations, prompt and completion"),
        ("foreign.csv", "a,b\n1,2\n", "found 'a, b'"),
        ("empty.jsonl", "", "no examples in it"),
        ("list.json", "[1]", "example 1: expected a JSON object, found int"),
    ],
)
def test_a_broken_file_is_told_with_its_place(
    name: str, content: str, said: str, cli: Cli, tmp_path: Path
) -> None:
    assert said in refused(cli, *ASKED, written(tmp_path / name, content))


def test_a_missing_file_is_told(cli: Cli) -> None:
    assert "nowhere.jsonl: cannot be read (No such file or directory)" in refused(
        cli, *ASKED, "nowhere.jsonl"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("plan", "--batch-size", "2"),
            "did you mean --effective-batch-size, --per-device-train-batch-size?",
        ),
        (("plan", "qwen2.5-0.5b", "17GB"), "one of the sizes 6GB, 8GB, 10GB"),
        (("plan", "qwen2.5-0.5b", "rx7900xtx"), "AMD hardware is not supported, only NVIDIA GPUs with CUDA"),
        (("plan", "qwen2.5-0.5b", "m3 max"), "Apple hardware is not supported, only NVIDIA GPUs with CUDA"),
    ],
)
def test_a_wrong_option_or_card_is_answered_with_what_there_is(
    arguments: tuple[str, ...], said: str, cli: Cli
) -> None:
    assert said in refused(cli, *arguments)


def test_the_words_of_the_page_say_what_they_mean(cli: Cli, tmp_path: Path) -> None:
    rows = [{"text": "a" * 4 * length} for length in range(20, 420, 10)]
    data = written(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    asked = ("plan", "qwen2.5-0.5b", "rtx-4090", "--data", data, "--no-packing", "--full")
    page = words(cli(*asked).out)
    assert "tokens/s of the data itself; padding is " in page
    assert "Speed against memory: setups that none tried beats in both" in page
    assert " a GPU-hour (" in page
    for puzzling in ("a second of the data's own", "the best of all that was tried", "an hour and GPU"):
        assert puzzling not in page


def test_what_is_not_nothing_has_a_figure_and_a_bar(cli: Cli) -> None:
    page = cli("plan", "qwen2.5-0.5b", "16GB", "--max-length", "512", "--lora-r", "1", "--full").out
    memory = page[page.index("\nMemory") : page.index("\n  peak phase")]
    lines = [line for line in memory.splitlines() if " GiB" not in line and "0.00" in line]
    assert not lines
    smallest = next(line for line in memory.splitlines() if "<0.01" in line)
    assert smallest.rstrip()[-1] in "▏▎▍▌▋▊▉█"
    asked = ("plan", "qwen2.5-14b", "16GB", "--max-length", "4096", "--gradient-checkpointing", "--explain")
    nothing = [line for line in cli(*asked).out.splitlines() if line.startswith("  head and loss  ")]
    assert nothing[0].split("0.00")[1].strip() == "not held at the peak"


def test_compare_tells_what_a_million_tokens_cost(cli: Cli) -> None:
    pairs = ("--model", "qwen2.5-0.5b", "--gpu", "16GB", "--gpu", "rtx-4090")
    asked = ("compare", *pairs, "--max-length", "512", "--compile", "none")
    page = cli(*asked).out
    costs = [line.split()[-1] for line in page.splitlines()[:3]]
    usd = json.loads(cli(*asked, "--json").out)["rows"][1]["usd_per_million_tokens"]
    assert costs == ["$/M", "?", f"{usd:.2f}" if usd >= 0.005 else "<0.01"]
    assert "? where no price is known" in page
    # A column that has no room would take the ends of others.
    assert (
        "$/M" not in cli(*asked, "--model", "deepseek-r1-distill-qwen-1.5b", "--gpu", "rtx-5060-ti-16gb").out
    )


def test_every_interface_counts_parameters_alike(cli: Cli) -> None:
    """Three digits of them: the demo's 2.49 million are not two."""
    model = next(one for one in list_models() if one.id == "llama-3.2-1b")
    (row,) = model_rows([model])
    setup = TrainingSetup(model=model.id, max_length=512)
    shown = question(size_up(setup, resolve_model(model.id), card_from_text("16GB")), "grey").plain
    assert row.detail.strip() == "1.24B"
    assert "llama-3.2-1b 1.24B on 16GB" in shown
    (small,) = model_rows([dataclasses.replace(model, parameter_count=2_490_000)])
    assert small.detail.strip() == "2.49M"
    asked = (
        "plan",
        model.id,
        "16GB",
        "--max-length",
        "512",
        "--method",
        "lora",
        "--compile",
        "none",
        "--full",
    )
    assert "of 1.24B parameters" in words(cli(*asked).out)
