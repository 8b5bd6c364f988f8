from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.base.errors import InputError
from planner.data import files as data_files
from planner.data.reader import (
    Conversation,
    PlainText,
    PromptCompletion,
    estimate_stats,
    read_training_data,
)

TURN = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_four_forms_are_read(tmp_path: Path) -> None:
    (conversation,) = read_training_data(jsonl(tmp_path, {"messages": [TURN, ANSWER], "id": 7})).examples
    assert isinstance(conversation, Conversation)
    assert conversation.messages[1].content == "Hello"
    (pair,) = read_training_data(jsonl(tmp_path, {"prompt": "2+2=", "completion": "4"})).examples
    assert pair == PromptCompletion("2+2=", "4")
    (text,) = read_training_data(jsonl(tmp_path, {"text": "Once"})).examples
    assert text == PlainText("Once")
    data = read_training_data(
        jsonl(
            tmp_path,
            {"instruction": "Add.", "input": "2 {and} 2", "output": "4"},
            {"instruction": "Sing.", "input": "", "output": "La"},
        )
    )
    assert data.format == "prompt_completion"
    first, second = data.examples
    assert isinstance(first, PromptCompletion)
    assert isinstance(second, PromptCompletion)
    assert first.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n2 {and} 2\n\n### Response:\n")
    assert "### Input" not in second.prompt


@pytest.mark.parametrize("name", ["data.json", "data.csv"])
def test_json_lists_and_csv_hold_the_same_examples(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    turns = [TURN, {"role": "assistant", "content": 'with "quotes",\nand a line break'}]
    if name == "data.json":
        path.write_text(json.dumps([{"messages": turns}]), encoding="utf-8")
    else:
        path.write_text('messages\n"' + json.dumps(turns).replace('"', '""') + '"\n', encoding="utf-8")
    (example,) = read_training_data(path).examples
    assert isinstance(example, Conversation)
    assert example.messages[1].content == turns[1]["content"]


BAD_ROWS = [
    ({"messages": [TURN]}, "last message is from user"),
    ({"messages": []}, "non-empty list"),
    ({"messages": "Hi"}, "non-empty list"),
    ({"messages": [TURN, {"role": "assistant", "content": "  "}]}, "answer is empty"),
    ({"messages": [TURN, {"role": "gpt", "content": "x"}]}, "role 'gpt'"),
    ({"messages": [TURN, {"role": ["assistant"], "content": "x"}]}, "role"),
    ({"messages": [TURN, {"content": "x"}]}, "role and content"),
    ({"messages": [TURN, "assistant"]}, "message 2"),
    ({"messages": [TURN, {"role": "assistant", "content": None}]}, "content must be text"),
    ({"messages": [TURN, {**ANSWER, "tool_calls": [{}]}]}, "tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "content must be text"),
    ({"prompt": "x", "completion": ""}, "completion is empty"),
    ({"prompt": "x"}, "expected messages"),
    ({"prompt": [TURN], "completion": "x"}, "both texts or both lists"),
    ({"instruction": "x", "output": "  "}, "output is empty"),
    ({"instruction": "x", "output": "y", "input": 3}, "input must be text"),
    ({"text": 5}, "text must be text"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "last message is from user"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "role 'narrator'"),
    ({}, "no keys"),
    ([1, 2], "expected a JSON object"),
    ("text", "expected a JSON object"),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
def test_a_bad_example_is_named_by_line_and_fault(tmp_path: Path, row: object, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_training_data(path)
    message = str(caught.value)
    assert said in message
    assert "line 2" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no examples"),
        (b"\n\n", "no examples"),
        (b'{"text": "a"}\n{"text": "b"\n', "line 2: broken JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "line 2: has prompt and completion"),
        (b"[" * 100_000, "line 1"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 1"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_training_data(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_huge_line_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 1000)
    path = jsonl(tmp_path, {"text": "a"}, {"text": "b" * 2000})
    with pytest.raises(InputError, match="line 2: longer than"):
        read_training_data(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path / "data.xlsx"):
        with pytest.raises(InputError, match=path.name):
            read_training_data(path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=r"folder\.jsonl"):
        read_training_data(tmp_path / "folder.jsonl")
    (tmp_path / "short.csv").write_text("prompt,completion\na\n")
    with pytest.raises(InputError, match="line 2"):
        read_training_data(tmp_path / "short.csv")
    (tmp_path / "object.json").write_text('{\n"text": "a"\n}')
    with pytest.raises(InputError, match="expected a JSON list"):
        read_training_data(tmp_path / "object.json")


def test_lengths_without_a_tokenizer_are_marked_as_estimates(tmp_path: Path) -> None:
    stats = estimate_stats(read_training_data(jsonl(tmp_path, {"prompt": "a" * 40, "completion": "b" * 7})))
    assert stats.estimated
    assert stats.loss_on == "completion"
    assert (stats.total_tokens, stats.loss_tokens) == (13, 3)
