"""Every row of the tables in docs/data.md, and no key of a row that disappears without a line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.base.errors import InputError, MissingExtraError
from planner.cli import plan_main
from planner.data.examples import Conversation, Message, PromptCompletion, TrainingData
from planner.data.reader import check_rows, estimate_file, read_training_data
from planner.data.turns import note_left_out
from tests.data_rows import ALPACA, ANSWER, CALLED, READ, REFUSED, TOOL, USER

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
PLAN = ["--model", "llama-3.2-1b", "--gpu", "16GB", "--data"]


def table(heading: str) -> list[str]:
    """First column of a table of the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append(line.split("|")[1].strip())
    return found


def read(*rows: object) -> TrainingData:
    return check_rows(((f"line {i}", row) for i, row in enumerate(rows, 1)), source="data")


def one(row: object) -> Any:
    (example,) = read(row).examples
    return example


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_page_lists_what_is_tested() -> None:
    assert table("read") == list(READ)
    assert table("refused") == list(REFUSED)
    assert table("file") == list(FILES)


@pytest.mark.parametrize("name", READ)
def test_every_kind_that_is_read_is_planned(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "data.jsonl", READ[name], READ[name])
    with pytest.raises(SystemExit) as ended:
        plan_main([*PLAN, str(path), "--full"])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    assert re.search(r"examples +2 ", shown.out)
    assert "left out" not in shown.out + shown.err


@pytest.mark.parametrize("name", REFUSED)
def test_every_kind_that_is_refused_says_why(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, reason = REFUSED[name]
    path = jsonl(tmp_path / "data.jsonl", row)
    with pytest.raises(SystemExit) as ended:
        plan_main([*PLAN, str(path)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert "line 1" in line


def test_turns_are_what_the_row_says() -> None:
    assert one(READ["ShareGPT conversations"]) == Conversation(
        (Message("user", "Hi"), Message("assistant", "Hello"))
    )
    assert [m.role for m in one(READ["ShareGPT with system and tools"]).messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    called = one(READ["tool_calls"])
    assert called.messages[1].to_dict() == {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert called.messages[2].more == (("name", "add"), ("tool_call_id", "c1"))
    assert called.tools == (TOOL,)
    assert one(READ["reasoning_content"]).messages[1].more == (("reasoning_content", "Two and two."),)
    assert [m.trained for m in one(READ["weight"]).messages] == [True, False, True, True]
    assert one(READ["content in parts of text"]).messages[0].content == "Hi"
    assert one(READ["key system beside messages"]).messages[0] == Message("system", "Be brief.")


def test_prompts_end_where_the_answer_begins() -> None:
    assert one(READ["prompt and completion of turns"]).completion_from == 1
    alpaca = one(READ["Alpaca with system and history"])
    assert [m.content for m in alpaca.messages] == ["Be brief.", "Hi", "Hello", "Add.\n2 and 2", "4"]
    assert alpaca.completion_from == 4
    plain = one(READ["Alpaca"])
    assert isinstance(plain, PromptCompletion)
    assert plain.completion == "4"
    asked = one({**READ["question and answer"], "system": "Be brief."})
    assert ([m.role for m in asked.messages], asked.completion_from) == (["system", "user", "assistant"], 2)


def test_lengths_count_tools_and_reasoning(tmp_path: Path) -> None:
    bare = estimate_file(jsonl(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]})).total_tokens
    for row in (
        {"messages": [USER, ANSWER], "tools": [TOOL] * 20},
        {"messages": [USER, {**ANSWER, "reasoning_content": "hm " * 1000}]},
    ):
        assert estimate_file(jsonl(tmp_path / "b.jsonl", row)).total_tokens > bare + 500


def test_keys_that_change_nothing_are_listed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": 7, "source": "web", "messages": [USER, {**ANSWER, "time": 1}]}
    with pytest.raises(SystemExit):
        plan_main([*PLAN, str(jsonl(tmp_path / "data.jsonl", row, row, {**row, "topic": "x"})), "--json"])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["data"]["left_out"] == ["id", "source", "messages[].time", "topic"]
    assert shown.err == ""


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(0, 9), st.text(max_size=5))
EXTRA = st.dictionaries(
    st.one_of(
        st.text(min_size=1, max_size=8),
        st.sampled_from(
            ["id", "system", "tools", "history", "label", "images", "weight", "prompt", "text", "input"]
        ),
        st.sampled_from(
            ["name", "train", "tool_calls", "reasoning_content", "function_call", "tool_call_id", "from"]
        ),
    ),
    SCALARS,
    max_size=4,
)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(sorted(READ)), EXTRA, EXTRA)
def test_no_key_of_a_row_disappears_without_a_line(
    name: str, in_row: dict[str, Any], in_turn: dict[str, Any]
) -> None:
    kind = READ[name]
    row: dict[str, Any] = {**in_row, **kind}
    added = {key: value for key, value in in_row.items() if key not in kind}
    turns = next((key for key in ("messages", "conversations", "completion") if key in kind), "text")
    if isinstance(kind.get(turns), list):
        last = kind[turns][-1]
        row[turns] = [*kind[turns][:-1], {**in_turn, **last}]
        added_turn = {key: value for key, value in in_turn.items() if key not in last}
    else:
        added_turn = {}
    try:
        data = read(row)
    except InputError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "line 1" in said
        return
    cases = [(key, value, "", {k: v for k, v in row.items() if k != key}) for key, value in added.items()]
    for key, value in added_turn.items():
        less = {k: v for k, v in row[turns][-1].items() if k != key}
        cases.append((key, value, f"{turns}[].", {**row, turns: [*row[turns][:-1], less]}))
    for key, value, before, without in cases:
        shown: dict[str, None] = {}
        note_left_out([key], shown, before)
        silent = value in (None, "") or (key == "weight" and value == 1)
        assert silent or shown.keys() <= set(data.left_out) or data.examples != read(without).examples, (
            key,
            value,
        )


TEXTS = ["first", "zweiter, größer", 'third "quoted"\nline']


def write_table(path: Path, separator: str) -> None:
    rows = [["prompt", "completion"], *([f"{text}?", text] for text in TEXTS)]
    shown = io.StringIO()
    csv.writer(shown, delimiter=separator).writerows(rows)
    path.write_text(shown.getvalue(), encoding="utf-8")


def pairs() -> list[dict[str, str]]:
    return [{"prompt": f"{text}?", "completion": text} for text in TEXTS]


def lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in pairs())


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def write_arrow(path: Path, rows: list[dict[str, str]]) -> None:
    pa = pytest.importorskip("pyarrow")
    made = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made)


def write_shards(path: Path) -> None:
    path.mkdir()
    for number, row in enumerate(pairs()):
        write_parquet(path / f"train-0000{number}-of-00003.parquet", [row])
    (path / "README.md").write_text("what this is")


def write_saved(path: Path) -> None:
    path.mkdir()
    write_arrow(path / "data-00000-of-00001.arrow", pairs())
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (path / "dataset_info.json").write_text("{}")


FILES: dict[str, Any] = {
    "data.jsonl": lambda path: path.write_text(lines()),
    "data.json": lambda path: path.write_text(json.dumps(pairs(), indent=1)),
    "data.csv": lambda path: write_table(path, ","),
    "data.tsv": lambda path: write_table(path, "\t"),
    "data.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines().encode())),
    "data.parquet": lambda path: write_parquet(path, pairs()),
    "data.arrow": lambda path: write_arrow(path, pairs()),
    "folder of shards": write_shards,
    "folder of save_to_disk": write_saved,
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_holds_the_same_examples(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    examples = read_training_data(path).examples
    assert [e.completion for e in examples if isinstance(e, PromptCompletion)] == TEXTS
    assert estimate_file(path).examples == len(TEXTS)


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(lines())
    assert len(read_training_data(path).examples) == len(TEXTS)


def test_a_csv_field_may_be_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text\n" + "a" * 300_000 + "\n")
    (example,) = read_training_data(path).examples
    assert len(example.text) == 300_000  # type: ignore[union-attr]


def test_nulls_that_a_table_adds_are_no_keys(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "data.parquet"
    rows: list[Any] = [READ["tool_calls"], READ["reasoning_content"]]
    write_parquet(path, rows)
    data = read_training_data(path)
    assert data.examples == read(*rows).examples
    assert data.left_out == ()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="pyarrow"):
        read_training_data(tmp_path / "data.parquet")


def test_broken_files_and_mixed_folders_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines().encode())[:-12])
    (tmp_path / "no.parquet").write_bytes(b"nonsense")
    (tmp_path / "no.arrow").write_bytes(b"nonsense")
    splits = tmp_path / "splits"
    splits.mkdir()
    for split in ("train", "test"):
        jsonl(splits / f"{split}-00000-of-00001.jsonl", *pairs())
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    jsonl(mixed / "a.jsonl", *pairs())
    write_table(mixed / "b.csv", ",")
    for name, said in (
        ("cut.jsonl.gz", "broken gzip"),
        ("no.parquet", "not a Parquet file"),
        ("no.arrow", "not an Arrow file"),
        ("splits", "several splits"),
        ("mixed", "several kinds"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            read_training_data(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_a_prompt_fills_is_counted_and_not_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = {"prompt": "a" * 40, "completion": "b"}, {"prompt": "a" * 8000, "completion": "b"}
    path = jsonl(tmp_path / "data.jsonl", *[short] * 32, *[long] * 32)
    limit = ["--max-length", "512", "--effective-batch-size", "16", "--epochs", "1", "--json"]
    with pytest.raises(SystemExit) as ended:
        plan_main([*PLAN, str(path), *limit])
    shown = capsys.readouterr()
    assert ended.value.code == 0
    told = json.loads(shown.out)
    assert "32 of 64 examples are not trained" in told["data"]["notes"][0]
    assert told["duration"]["steps"] == 2
    jsonl(path, *[long] * 3)
    with pytest.raises(SystemExit) as ended:
        plan_main([*PLAN, str(path), *limit])
    assert ended.value.code == 2
    assert "none of the 3 examples has a token to learn" in capsys.readouterr().err


def test_rows_of_two_forms_are_not_mixed() -> None:
    with pytest.raises(InputError, match="line 2: has instruction and output with system or history"):
        read(ALPACA, {**ALPACA, "system": "Be brief."})
