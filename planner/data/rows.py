"""Rows of training data into examples: which form a row has, what each form means, what is refused and why.

The forms, told by keys, in this order:

- `messages`, or ShareGPT's `conversations`: a list of turns (planner.data.turns).
- `prompt` and `completion`: two texts, joined as they stand; or two lists of turns, as TRL takes them.
- `instruction`, `output` and an optional `input`: Alpaca's form, turned into prompt and completion with
  Alpaca's own template (https://github.com/tatsu-lab/stanford_alpaca#data-release). With the keys `system` or
  `history`, for which that template has no place, turned into the turns of a conversation.
- `question` and `answer`: a conversation of two turns, of which the answer is learned.
- `text`: one text.

Every other key is refused where it would change what is learned, else named once as left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from planner.base.errors import InputError, shorten
from planner.data.examples import Conversation, Example, Message, PlainText, PromptCompletion
from planner.data.files import parse_json
from planner.data.images import IMAGE_KEYS, with_pictures
from planner.data.turns import NOTHING, check_text, note_left_out, read_tools, read_turns

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
EXPECTED = (
    "messages, conversations, prompt and completion, instruction and output, question and answer, or text"
)
_NOT_TRAINED = ("videos", "video", "audios", "audio")
# Keys that change what an example means, refused in the forms that do not read them.
_MEANINGFUL = ("system", "history", "tools", "weight", "chat_template_kwargs", "documents")
_UNUSABLE: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("chosen", "rejected"),
        "preference data; supervised fine-tuning learns one answer: give the chosen one as messages",
    ),
    (("input_ids",), "tokens instead of text; give the text, which the model's own tokenizer then reads"),
    (("segments",), "Axolotl's segments are not read; give them as prompt and completion"),
    (("input", "output"), "name them prompt and completion, or question and answer for a conversation"),
)
_NO_ANSWER = "a prompt without an answer, as GRPO takes it; supervised fine-tuning needs a completion"


def form_of(row: Mapping[str, Any], where: str) -> str:
    """The form of a row, in words.

    Raises:
        InputError: a row of none, or one that cannot be learned from by supervised fine-tuning.
    """
    if {"chosen", "rejected"} <= row.keys():
        raise InputError(f"{where}: {_UNUSABLE[0][1]} (found chosen, rejected)")
    for key in _NOT_TRAINED if not row.keys().isdisjoint(_NOT_TRAINED) else ():
        if row.get(key) not in NOTHING:
            raise InputError(f"{where}: {key}: videos and sound are not trained, only text and images")
    for form, keys in _KEYS_OF_FORM.items():
        if all(key in row for key in keys):
            if form == "instruction and output" and {"system", "history"} & row.keys():
                form = "instruction and output with system or history"
            _refuse_meaningful(row, form, where)
            if form not in _SHOWING:
                _refuse_images(row, form, where)
            return form
    present = shorten(", ".join(str(key) for key in row)) if row else "no keys"
    for keys, reason in _UNUSABLE:
        if all(key in row for key in keys):
            raise InputError(f"{where}: {reason} (found {present})")
    if "prompt" in row:
        raise InputError(f"{where}: {_NO_ANSWER} (expected {EXPECTED}; found {present})")
    raise InputError(f"{where}: expected {EXPECTED}; found {present}")


def example_of(
    row: Mapping[str, Any], form: str, where: str, left_out: dict[str, None], folder: Path
) -> Example:
    """The example of a row of that form; keys that nothing is made of are added to `left_out`. Its images are
    named from `folder`.

    Raises:
        InputError: the row is not usable.
    """
    read = _READ_IN_FORM[form] + _NOT_TRAINED + IMAGE_KEYS
    note_left_out((key for key in row if key not in read), left_out)
    example = _MAKERS[form](row, where, left_out)
    if isinstance(example, Conversation):
        return with_pictures(example, row, folder, where)
    _refuse_images(row, form, where)
    return example


def _refuse_images(row: Mapping[str, Any], form: str, where: str) -> None:
    for key in IMAGE_KEYS if not row.keys().isdisjoint(IMAGE_KEYS) else ():
        if row.get(key) not in NOTHING:
            raise InputError(
                f"{where}: {key}: images are shown in turns; {form} is text: give it as messages"
            )


def format_of(form: str) -> str:
    """One of FORMATS."""
    return form if form == "text" else "messages" if form in _TURNS else "prompt_completion"


def _refuse_meaningful(row: Mapping[str, Any], form: str, where: str) -> None:
    if row.keys() <= set(_READ_IN_FORM[form]):
        return
    if str(row.get("label")) in ("True", "False", "true", "false") and form != "text":
        raise InputError(
            f"{where}: label: answers marked as good and bad, as KTO takes them; supervised fine-tuning "
            "would learn the bad ones too: keep the rows with true and leave label out"
        )
    for key in _MEANINGFUL:
        if key in _READ_IN_FORM[form] or row.get(key) in (None, "", [], {}, "[]", 1):
            continue
        raise InputError(f"{where}: {key} is not read beside {form}; it would change what is learned")


def _turns_of(key: str) -> Callable[[Mapping[str, Any], str, dict[str, None]], Conversation]:
    def make(row: Mapping[str, Any], where: str, left_out: dict[str, None]) -> Conversation:
        messages = read_turns(row[key], key, where, left_out)
        messages = _with_system(row, messages, where)
        if messages[-1].role != "assistant":
            raise InputError(
                f"{where}: the last message is from {messages[-1].role}, so there is no answer to learn"
            )
        return Conversation(messages, read_tools(row.get("tools"), where))

    return make


def _with_system(row: Mapping[str, Any], messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    system = _optional(row, "system", where)
    if not system:
        return messages
    if messages[0].role in ("system", "developer"):
        raise InputError(f"{where}: has both the key system and a system message; keep one")
    return (Message("system", system), *messages)


def _prompt_completion(row: Mapping[str, Any], where: str, left_out: dict[str, None]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise InputError(f"{where}: prompt and completion must be both texts or both lists of turns")
    tools = read_tools(row.get("tools"), where)
    if isinstance(prompt, str):
        if tools:
            raise InputError(f"{where}: tools are not read beside a prompt that is text; give it as turns")
        return PromptCompletion(_text(row, "prompt", where), _text(row, "completion", where))
    asked = read_turns(prompt, "prompt", f"{where}: prompt", left_out)
    answered = read_turns(completion, "completion", f"{where}: completion", left_out)
    if answered[-1].role != "assistant":
        raise InputError(
            f"{where}: the last message is from {answered[-1].role}, so there is no answer to learn"
        )
    return Conversation(asked + answered, tools, completion_from=len(asked))


def _instruction(row: Mapping[str, Any], where: str, left_out: dict[str, None]) -> PromptCompletion:
    instruction, output = _text(row, "instruction", where), _text(row, "output", where)
    context = _optional(row, "input", where)
    template = ALPACA_WITH_INPUT if context.strip() else ALPACA_WITHOUT_INPUT
    return PromptCompletion(template.format(instruction=instruction, input=context), output)


def _instruction_in_turns(row: Mapping[str, Any], where: str, left_out: dict[str, None]) -> Conversation:
    instruction, output = _text(row, "instruction", where), _text(row, "output", where)
    context = _optional(row, "input", where)
    asked = f"{instruction}\n{context}" if context.strip() else instruction
    turns = [
        Message(role, said)
        for pair in _history(row.get("history"), where)
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    turns.append(Message("user", asked))
    messages = _with_system(row, tuple(turns), where)
    return Conversation((*messages, Message("assistant", output)), completion_from=len(messages))


def _history(value: object, where: str) -> list[list[str]]:
    if isinstance(value, str) and value.strip():
        value = parse_json(value.encode("utf-8", "surrogatepass"), f"{where}: history")
    if value in NOTHING:
        return []
    pairs: list[Any] = value if isinstance(value, list) else [value]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise InputError(
                f"{where}: history must be pairs of instruction and answer, found {shorten(pair)}"
            )
        for each in pair:
            check_text(each, "history", where)
    return pairs


def _question(row: Mapping[str, Any], where: str, left_out: dict[str, None]) -> Conversation:
    asked = Message("user", _text(row, "question", where))
    messages = _with_system(row, (asked,), where)
    answer = Message("assistant", _text(row, "answer", where))
    return Conversation((*messages, answer), completion_from=len(messages))


def _plain_text(row: Mapping[str, Any], where: str, left_out: dict[str, None]) -> PlainText:
    return PlainText(_text(row, "text", where))


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be text, found {shorten(value)}")
    if not value.strip():
        raise InputError(f"{where}: {key} is empty")
    check_text(value, key, where)
    return value


def _optional(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {key} must be text, found {shorten(value)}")
    check_text(value or "", key, where)
    return value or ""


_TURNS = ("messages", "conversations")
_SHOWING = (*_TURNS, "prompt and completion", "question and answer")
"""Forms whose examples may be turns, and so may show images."""
_KEYS_OF_FORM = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
    "question and answer": ("question", "answer"),
    "text": ("text",),
}
_READ_IN_FORM = {
    "messages": ("messages", "system", "tools"),
    "conversations": ("conversations", "system", "tools"),
    "prompt and completion": ("prompt", "completion", "tools"),
    "instruction and output": ("instruction", "output", "input"),
    "instruction and output with system or history": ("instruction", "output", "input", "system", "history"),
    "question and answer": ("question", "answer", "system"),
    "text": ("text",),
}
_MAKERS: dict[str, Callable[[Mapping[str, Any], str, dict[str, None]], Example]] = {
    "messages": _turns_of("messages"),
    "conversations": _turns_of("conversations"),
    "prompt and completion": _prompt_completion,
    "instruction and output": _instruction,
    "instruction and output with system or history": _instruction_in_turns,
    "question and answer": _question,
    "text": _plain_text,
}
