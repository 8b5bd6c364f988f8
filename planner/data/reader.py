"""Read and check training data: JSONL, JSON and CSV into typed examples, with the place of every mistake.

One file holds one format, told by the first example's keys, in this order:

- `messages`: a list of {"role", "content"}; other keys of a message are refused when they change its meaning.
- `prompt` and `completion`: two texts, joined as they stand.
- `instruction`, `output` and an optional `input`: Alpaca's form, turned into prompt and completion with
  Alpaca's own template (https://github.com/tatsu-lab/stanford_alpaca#data-release).
- `text`: one text.

Further keys of an example are left out. Parquet is read by launcher.training.dataset.
"""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.base.errors import InputError, shorten
from planner.data.lengths import DatasetStats

FORMATS = ("messages", "prompt_completion", "text")
ROLES = ("system", "user", "assistant", "tool")
MAX_LINE_BYTES = 64 * 2**20
MAX_JSON_BYTES = 2 * 2**30
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
# English text averages about four characters a token (https://help.openai.com/en/articles/4936856). UTF-8
# bytes stand for characters: other scripts need more tokens a character, and have more bytes.
BYTES_PER_TOKEN = 4
# ChatML's <|im_start|>, role, line break, <|im_end|>, line break.
TOKENS_PER_MESSAGE = 5


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """An example of the `messages` format; the last turn is the assistant's."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """An example whose loss is taken on the completion alone."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class PlainText:
    """An example whose loss is taken on all of its text."""

    text: str


Example = Conversation | PromptCompletion | PlainText


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The checked examples of one file, all of one format (one of FORMATS)."""

    format: str
    examples: tuple[Example, ...]
    source: str


def read_training_data(path: Path) -> TrainingData:
    """Read a .jsonl, .json or .csv file.

    Raises:
        InputError: the file cannot be read, or an example is not usable; one line that names the place.
    """
    try:
        return check_rows(_rows(path), source=str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_rows(rows: Iterable[tuple[str, object]], *, source: str) -> TrainingData:
    """Check rows given as (place, row) and turn them into examples of one format.

    Raises:
        InputError: no row at all, or a row that is not usable; one line with `source` and the place.
    """
    formats: set[str] = set()
    examples: list[Example] = []
    for data_format, example in _checked(rows, source):
        formats.add(data_format)
        examples.append(example)
    return TrainingData(format=formats.pop(), examples=tuple(examples), source=source)


def estimate_file(path: Path) -> DatasetStats:
    """Lengths of a .jsonl, .json or .csv file, estimated as estimate_stats does, holding no example.

    Raises:
        InputError: as read_training_data.
    """
    try:
        return _estimated(_checked(_rows(path), str(path)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def estimate_stats(data: TrainingData) -> DatasetStats:
    """Lengths estimated from the size of the text, without a tokenizer; marked as an estimate."""
    return _estimated((data.format, example) for example in data.examples)


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    suffix = path.suffix.lower()
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    if suffix not in readers:
        raise InputError(f"{path}: unknown kind of data file; expected .jsonl, .json, .csv or .parquet")
    return readers[suffix](path)


def _checked(rows: Iterable[tuple[str, object]], source: str) -> Iterator[tuple[str, Example]]:
    """Each row's format and example; all of one format, at least one."""
    found: str | None = None
    for place, row in rows:
        where = f"{source}: {place}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
        form = _form(row, where)
        if found is None:
            found = form
        elif form != found:
            raise InputError(f"{where}: has {form}, but the examples before it have {found}; use one format")
        yield _FORMAT_OF_FORM[form], _EXAMPLE_MAKERS[form](row, where)
    if found is None:
        raise InputError(f"{source}: no examples in it")


def _estimated(examples: Iterable[tuple[str, Example]]) -> DatasetStats:
    lengths: list[int] = []
    loss_tokens, form = 0, ""
    for data_format, example in examples:
        form = data_format
        match example:
            case Conversation(messages=messages):
                length = sum(_tokens(m.content) + TOKENS_PER_MESSAGE for m in messages)
                in_loss = length
            case PromptCompletion(prompt=prompt, completion=completion):
                in_loss = _tokens(completion) + 1
                length = _tokens(prompt) + in_loss
            case PlainText(text=text):
                length = in_loss = _tokens(text) + 1
        lengths.append(length)
        loss_tokens += in_loss
    return DatasetStats.from_lengths(
        lengths,
        loss_tokens=loss_tokens,
        loss_on="completion" if form == "prompt_completion" else "all",
        data_format=form,
        estimated=True,
    )


def _tokens(text: str) -> int:
    size = len(text) if text.isascii() else len(text.encode("utf-8"))
    return -(-size // BYTES_PER_TOKEN)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{path}: {place}: longer than {MAX_LINE_BYTES // 2**20} MiB")
            if line.strip():
                yield place, _parse_json(line, f"{path}: {place}")


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path}: larger than {MAX_JSON_BYTES // 2**30} GiB; use .jsonl, one example a line")
    content = path.read_bytes()
    if not content.strip():
        return
    parsed = _parse_json(content, str(path))
    if not isinstance(parsed, list):
        raise InputError(f"{path}: expected a JSON list of examples; one example a line belongs in .jsonl")
    for number, row in enumerate(parsed, start=1):
        yield f"example {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"{path}: {place}: not as many values as the header has names")
                yield place, decode_messages_column(row, f"{path}: {place}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV file: {error}") from error


def decode_messages_column(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Tables hold `messages` as JSON text: replace the text by what it says."""
    if isinstance(row.get("messages"), str):
        return {**row, "messages": _parse_json(row["messages"].encode(), where)}
    return row


def _parse_json(content: bytes, where: str) -> object:
    try:
        parsed: object = json.loads(content.removeprefix(BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: JSON out of bounds: {error}") from error
    return parsed


def _form(row: Mapping[str, Any], where: str) -> str:
    for form, keys in _KEYS_OF_FORM.items():
        if all(key in row for key in keys):
            return form
    hint = "; ShareGPT's conversations are not read, rename to messages" if "conversations" in row else ""
    present = ", ".join(str(key) for key in row) if row else "no keys"
    raise InputError(
        f"{where}: expected messages, prompt and completion, instruction and output, or text; "
        f"found {shorten(present)}{hint}"
    )


def _conversation(row: Mapping[str, Any], where: str) -> Conversation:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: messages must be a non-empty list, found {shorten(turns)}")
    messages = tuple(_message(turn, f"{where}: message {i}") for i, turn in enumerate(turns, start=1))
    if messages[-1].role != "assistant":
        raise InputError(
            f"{where}: the last message is from {messages[-1].role}, so there is no answer to learn"
        )
    return Conversation(messages)


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
        raise InputError(f"{where}: expected an object with role and content, found {shorten(turn)}")
    for key in ("tool_calls", "function_call", "weight", "train"):
        if turn.get(key) is not None:
            raise InputError(f"{where}: {key} is not supported")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise InputError(f"{where}: role {shorten(role)} is not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{where}: content must be text, found {shorten(content)}")
    if role == "assistant" and not content.strip():
        raise InputError(f"{where}: the assistant's answer is empty")
    return Message(role, content)


def _prompt_completion(row: Mapping[str, Any], where: str) -> PromptCompletion:
    for key in ("prompt", "completion"):
        if isinstance(row[key], list):
            raise InputError(f"{where}: {key} is a list; put the turns of a conversation under messages")
    return PromptCompletion(_text(row, "prompt", where), _text(row, "completion", where))


def _instruction(row: Mapping[str, Any], where: str) -> PromptCompletion:
    instruction, output = _text(row, "instruction", where), _text(row, "output", where)
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        raise InputError(f"{where}: input must be text, found {shorten(context)}")
    template = ALPACA_WITH_INPUT if context and context.strip() else ALPACA_WITHOUT_INPUT
    return PromptCompletion(template.format(instruction=instruction, input=context), output)


def _plain_text(row: Mapping[str, Any], where: str) -> PlainText:
    return PlainText(_text(row, "text", where))


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be text, found {shorten(value)}")
    if not value.strip():
        raise InputError(f"{where}: {key} is empty")
    return value


_KEYS_OF_FORM = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
    "text": ("text",),
}
_FORMAT_OF_FORM = {
    "messages": "messages",
    "prompt and completion": "prompt_completion",
    "instruction and output": "prompt_completion",
    "text": "text",
}
_EXAMPLE_MAKERS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "messages": _conversation,
    "prompt and completion": _prompt_completion,
    "instruction and output": _instruction,
    "text": _plain_text,
}
