"""Training data for the training process: Parquet, chat templates, exact token lengths, TRL's dataset form.

The checks live in planner.data.reader, so that planning without the training stack sees the same data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.base.errors import InputError, MissingExtraError, shorten
from planner.data.lengths import DatasetStats
from planner.data.reader import (
    Conversation,
    Example,
    PlainText,
    PromptCompletion,
    TrainingData,
    check_rows,
    decode_messages_column,
    read_training_data,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOKENIZER_BATCH = 1000
# ChatML (https://github.com/openai/openai-python/blob/v0.28.1/chatml.md), for tokenizers without a template.
# The end-of-sequence token closes the assistant's turn, so that the model learns to stop.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_dataset(path: Path) -> TrainingData:
    """Read and check a .jsonl, .json, .csv or .parquet file.

    Raises:
        InputError: the file cannot be read, or an example is not usable; one line that names the place.
    """
    if path.suffix.lower() != ".parquet":
        return read_training_data(path)
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtraError("reading Parquet", "pandas") from error
    try:
        frame = pd.read_parquet(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise InputError(f"{path}: not a Parquet file: {shorten(str(error))}") from error
    return check_rows(_frame_rows(frame, path), source=str(path))


def _frame_rows(frame: Any, path: Path) -> Iterator[tuple[str, object]]:
    columns = [str(name) for name in frame.columns]
    for number, values in enumerate(frame.itertuples(index=False, name=None), start=1):
        place = f"row {number}"
        row = {name: _plain(value) for name, value in zip(columns, values, strict=True)}
        yield place, decode_messages_column(row, f"{path}: {place}")


def _plain(value: Any) -> Any:
    """numpy's containers and pandas' missing values as JSON would give them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the ChatML fallback; True if it needed it."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = CHATML_TEMPLATE
    return True


def measure_stats(
    data: TrainingData, tokenizer: PreTrainedTokenizerBase, *, assistant_only_loss: bool = False
) -> DatasetStats:
    """Token lengths as TRL's SFTTrainer will make them (template, special and end tokens included).

    Raises:
        InputError: the chat template refuses an example; the line names which.
    """
    if data.format == "messages":
        ensure_chat_template(tokenizer)
    lengths: list[int] = []
    loss_tokens = 0
    examples = iter(enumerate(data.examples, start=1))
    while batch := list(islice(examples, TOKENIZER_BATCH)):
        measured = _measure(batch, data, tokenizer, assistant_only_loss)
        for length, in_loss in measured:
            lengths.append(length)
            loss_tokens += in_loss
    loss_on = {"messages": "assistant" if assistant_only_loss else "all", "prompt_completion": "completion"}
    return DatasetStats.from_lengths(
        lengths,
        loss_tokens=loss_tokens,
        loss_on=loss_on.get(data.format, "all"),
        data_format=data.format,
        estimated=False,
    )


def _measure(
    batch: list[tuple[int, Example]], data: TrainingData, tokenizer: Any, assistant_only_loss: bool
) -> list[tuple[int, int]]:
    """(tokens, tokens in the loss) of each example."""
    if assistant_only_loss and data.format == "messages":
        return [_assistant_tokens(e, tokenizer, f"{data.source}: example {n}") for n, e in batch]
    texts = [_rendered(e, tokenizer, f"{data.source}: example {n}") for n, e in batch]
    # A chat template writes the special tokens itself; plain text gets the tokenizer's.
    special = data.format != "messages"
    wholes = tokenizer(texts, add_special_tokens=special)["input_ids"]
    if data.format != "prompt_completion":
        return [(len(ids), len(ids)) for ids in wholes]
    prompts = tokenizer([e.prompt for _, e in batch if isinstance(e, PromptCompletion)])["input_ids"]
    pairs = zip(wholes, prompts, strict=True)
    return [(len(whole), len(whole) - _common_prefix(whole, prompt)) for whole, prompt in pairs]


def _rendered(example: Example, tokenizer: Any, where: str) -> str:
    eos = tokenizer.eos_token or ""
    match example:
        case Conversation():
            return str(_apply_template(example, tokenizer, where, tokenize=False))
        case PromptCompletion(prompt=prompt, completion=completion):
            return prompt + (completion if completion.endswith(eos) else completion + eos)
        case PlainText(text=text):
            return text if text.endswith(eos) else text + eos


def _assistant_tokens(example: Example, tokenizer: Any, where: str) -> tuple[int, int]:
    assert isinstance(example, Conversation)
    made = _apply_template(
        example, tokenizer, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return len(made["input_ids"]), sum(made["assistant_masks"])


def _apply_template(example: Conversation, tokenizer: Any, where: str, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(_turns(example), **options)
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses it: {shorten(str(error), 120)}") from error


def _turns(example: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in example.messages]


def _common_prefix(first: list[int], second: list[int]) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def to_trl_dataset(data: TrainingData) -> Dataset:
    """The examples in the columns that SFTTrainer reads: messages, prompt and completion, or text."""
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    for example in data.examples:
        match example:
            case Conversation():
                rows.append({"messages": _turns(example)})
            case PromptCompletion(prompt=prompt, completion=completion):
                rows.append({"prompt": prompt, "completion": completion})
            case PlainText(text=text):
                rows.append({"text": text})
    return Dataset.from_list(rows)
