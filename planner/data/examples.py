"""Training examples as they are held once they are read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.data.image_rule import ImageRule, ImageSize
from planner.data.lengths import DatasetStats

FORMATS = ("messages", "prompt_completion", "text")
# English text averages about four characters a token (https://help.openai.com/en/articles/4936856). UTF-8
# bytes stand for characters: other scripts need more tokens a character, and have more bytes.
BYTES_PER_TOKEN = 4
# ChatML's <|im_start|>, role, line break, <|im_end|>, line break.
TOKENS_PER_MESSAGE = 5


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of an example: its file, and its size as it is shown."""

    path: str
    size: ImageSize


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `parts` are texts and pictures in their order where there are pictures, and `content` the texts together.
    `trained` is False for a turn that is to stay out of the loss. `more` holds what a chat template may
    render beside role and content: reasoning_content or its other names, tool_calls, name, tool_call_id.
    """

    role: str
    content: str
    trained: bool = True
    more: tuple[tuple[str, Any], ...] = ()
    parts: tuple[str | Picture, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a chat template takes it."""
        content: Any = self.content
        if self.parts:
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in self.parts
            ]
        return {"role": self.role, "content": content, **dict(self.more)}

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Its pictures, in their order."""
        return tuple(part for part in self.parts if isinstance(part, Picture))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, the last of which is the assistant's, and the tools they may call.

    `completion_from` is the place of the first turn whose loss is taken, counted from 0, where the turns were
    given as prompt and completion; else None. `tools` are JSON schemas, passed to the chat template.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    completion_from: int | None = None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Those of all turns, in their order."""
        return tuple(picture for message in self.messages if message.parts for picture in message.pictures)


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
    """The checked examples of one file or folder, all of one format (one of FORMATS).

    `left_out` are the keys of rows that nothing is made of, each once.
    """

    format: str
    examples: tuple[Example, ...]
    source: str
    left_out: tuple[str, ...] = ()

    @property
    def has_images(self) -> bool:
        """Whether any example has a picture."""
        return any(isinstance(one, Conversation) and one.pictures for one in self.examples)


def estimated_stats(
    examples: Iterable[tuple[str, Example]],
    left_out: Iterable[str],
    source: str,
    rule: ImageRule | None = None,
) -> DatasetStats:
    """Lengths of (format, example) pairs from the size of their texts, without a tokenizer, and the tokens
    that `rule` makes of their pictures (null: of a model of text, which takes none).

    `left_out` is read after the examples. The statistics are marked as estimates.

    Raises:
        InputError: no example has a token to learn.
    """
    lengths: list[int] = []
    starts: list[int] = []
    loss_tokens, untrained, form = 0, 0, ""
    pictures = Pictures()
    for data_format, example in examples:
        form = data_format
        pictures.count(example, rule)
        length, in_loss, start = _estimated(example, rule)
        if not in_loss:
            untrained += 1
            continue
        lengths.append(length)
        starts.append(start)
        loss_tokens += in_loss
    if untrained and not lengths:
        raise nothing_to_learn(untrained, source)
    return DatasetStats.from_lengths(
        lengths,
        loss_tokens=loss_tokens,
        loss_on="completion" if form == "prompt_completion" else "all",
        data_format=form,
        estimated=True,
        starts=starts,
        untrained=untrained,
        left_out=left_out,
        images=pictures.images,
        image_patches=pictures.most_patches,
        total_patches=pictures.patches,
    )


class Pictures:
    """Counts the pictures of examples, and the patches that a rule makes of them: in all, and of the example
    with most.
    """

    def __init__(self) -> None:
        self.images = self.patches = self.most_patches = 0

    def count(self, example: Example, rule: ImageRule | None) -> None:
        """Add an example."""
        found = example.pictures if isinstance(example, Conversation) else ()
        if not found:
            return
        self.images += len(found)
        patches = 0 if rule is None else sum(rule.patches(one.size) for one in found)
        self.patches += patches
        self.most_patches = max(self.most_patches, patches)


def nothing_to_learn(examples: int, source: str) -> InputError:
    """The refusal of data of which nothing would be trained at any length."""
    return InputError(f"{source}: none of the {examples:,} examples has a token to learn")


def _estimated(example: Example, rule: ImageRule | None) -> tuple[int, int, int]:
    """(tokens, tokens in the loss, tokens before the first of those) of an example."""
    match example:
        case Conversation():
            return _conversation(example, rule)
        case PromptCompletion(prompt=prompt, completion=completion):
            before, in_loss = _tokens(prompt), _tokens(completion) + 1
            return before + in_loss, in_loss, before
        case PlainText(text=text):
            length = _tokens(text) + 1
            return length, length, 0


def _conversation(example: Conversation, rule: ImageRule | None) -> tuple[int, int, int]:
    length = _tokens_of_json(example.tools) if example.tools else 0
    learns_all = example.completion_from is None
    in_loss, start = (length, 0 if length else None) if learns_all else (0, None)
    for place, message in enumerate(example.messages):
        own = _tokens(message.content) + TOKENS_PER_MESSAGE
        if rule is not None:
            own += sum(rule.tokens(rule.patches(one.size)) + rule.around for one in message.pictures)
        for _, value in message.more:
            own += _tokens(value) if isinstance(value, str) else _tokens_of_json(value)
        if message.trained and place >= (example.completion_from or 0):
            in_loss += own
            start = length if start is None else start
        length += own
    return length, in_loss, start or 0


def _tokens(text: str) -> int:
    size = len(text) if text.isascii() else len(text.encode("utf-8"))
    return -(-size // BYTES_PER_TOKEN)


def _tokens_of_json(value: object) -> int:
    import json

    return _tokens(json.dumps(value, ensure_ascii=False))
