"""Turns of conversations: OpenAI's role and content, ShareGPT's from and value, tool calls and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from planner.base.errors import InputError, shorten
from planner.data.examples import Message, Picture
from planner.data.files import parse_json
from planner.data.images import part_of_image

NOTHING: tuple[object, ...] = (None, "", [])
"""Values that say no more than an absent key."""
ROLES = ("system", "developer", "user", "assistant", "tool")
# The names of ShareGPT's `from`, as its data sets and LLaMA-Factory's sharegpt format write them.
ROLE_OF_SPEAKER = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
REASONING = ("reasoning_content", "thinking", "reasoning")
"""What an assistant thought, by the names under which templates render it: Qwen3's and DeepSeek's, that of
gpt-oss (message.thinking), and the one of OpenAI-like interfaces."""
# What a chat template may render beside role and content, as text.
_TEXTS = (*REASONING, "name", "tool_call_id")
_READ = {"role", "content", "from", "value", "tool_calls", "weight", *_TEXTS}
_PLAIN = {"role", "content"}
_REFUSED = {
    "function_call": "OpenAI's older function_call is not read; write it as tool_calls",
    "audio": "sound is not trained",
    "image": "name it in the row's key images",
    "images": "name them in the row's key images",
    "train": "not read; write it as weight, 0 or 1",
    "loss": "not read; write it as weight, 0 or 1",
}


def read_turns(turns: object, key: str, where: str, left_out: dict[str, None]) -> tuple[Message, ...]:
    """The messages of a list; keys that nothing is made of are added to `left_out`.

    Raises:
        InputError: a turn that is not usable.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_json(turns.encode("utf-8", "surrogatepass"), f"{where}: {key}")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: {key} must be a non-empty list, found {shorten(turns)}")
    return tuple(
        _message(turn, f"{where}: message {number}", key, left_out)
        for number, turn in enumerate(turns, start=1)
    )


def read_tools(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """The tools that a row offers: a list of JSON schemas, or JSON text of one.

    Raises:
        InputError: something else.
    """
    if isinstance(value, str) and value.strip():
        value = parse_json(value.encode("utf-8", "surrogatepass"), f"{where}: tools")
    if value in NOTHING:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise InputError(f"{where}: tools must be a list of JSON schemas, found {shorten(value)}")
    check_text(value, "tools", where)
    return tuple(value)


def check_text(value: object, key: str, where: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        InputError: a lone surrogate, which is half of a character.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        place = f" at character {error.start + 1}" if isinstance(value, str) else ""
        raise InputError(
            f"{where}: {key} holds half of a character{place} ({half}), which no tokenizer takes"
        ) from error


def note_left_out(keys: Iterable[object], left_out: dict[str, None], before: str = "") -> None:
    """Add keys to those that nothing is made of."""
    for key in keys:
        left_out.setdefault(f"{before}{_shown(key)}")


def _shown(key: object) -> str:
    text = str(key)
    plain = text.strip() and text.isprintable() and len(text) <= 40 and "," not in text
    return text if plain else shorten(text)


def _message(turn: object, where: str, key: str, left_out: dict[str, None]) -> Message:
    if not isinstance(turn, Mapping) or not ({"role", "from"} & turn.keys()):
        raise InputError(f"{where}: expected an object with role and content, found {shorten(turn)}")
    if turn.keys() == _PLAIN:
        plain = _plain(turn["role"], turn["content"], where)
        if plain is not None:
            return plain
    for name, reason in _REFUSED.items():
        if turn.get(name) not in NOTHING:
            raise InputError(f"{where}: {name} is not supported: {reason}")
    spoken = "role" not in turn
    role = _role(turn["from" if spoken else "role"], spoken, where)
    calls = _tool_calls(turn.get("tool_calls"), where)
    named = "value" if spoken else "content"
    content = turn.get(named)
    if named not in turn and not calls:
        raise InputError(f"{where}: expected an object with role and content, found {shorten(turn)}")
    if spoken and turn["from"] == "function_call":
        calls, content = (*calls, *_spoken_calls(content, where)), ""
    text, parts = _content(
        content, f"{where}: {named}", f"{key}[].{named}[]", left_out, may_be_absent=bool(calls)
    )
    more = [(name, turn[name]) for name in _TEXTS if turn.get(name) not in (None, "")]
    for name, value in (("content", text), *more):
        if not isinstance(value, str):
            raise InputError(f"{where}: {name} must be text, found {shorten(value)}")
        check_text(value, name, where)
    if calls:
        check_text(calls, "tool_calls", where)
        more.append(("tool_calls", list(calls)))
    if role == "assistant" and not text.strip() and not calls:
        raise InputError(f"{where}: the assistant's answer is empty")
    if calls and role != "assistant":
        raise InputError(f"{where}: tool_calls belong to the assistant, not to {role}")
    other = {"from", "value"} if not spoken else {"role", "content"}
    note_left_out(
        (name for name in turn if name not in (_READ | _REFUSED.keys()) - other), left_out, f"{key}[]."
    )
    return Message(role, text, _trained(turn.get("weight"), where), tuple(more), parts)


def _plain(role: object, content: object, where: str) -> Message | None:
    """The usual turn, which most of a large file are: half the time of the general way."""
    if not (isinstance(role, str) and role in ROLES and isinstance(content, str) and content.strip()):
        return None
    check_text(content, "content", where)
    return Message(role, content)


def _role(role: object, spoken: bool, where: str) -> str:
    known = tuple(ROLE_OF_SPEAKER) if spoken else ROLES
    if not isinstance(role, str) or role not in known:
        raise InputError(f"{where}: role {shorten(role)} is not one of {', '.join(known)}")
    return ROLE_OF_SPEAKER[role] if spoken else role


def _trained(weight: object, where: str) -> bool:
    if weight is None:
        return True
    if isinstance(weight, int | float) and weight in (0, 1):
        return bool(weight)
    raise InputError(f"{where}: weight {shorten(weight)} is not supported; expected 0 or 1")


def _content(
    content: object, where: str, path: str, left_out: dict[str, None], *, may_be_absent: bool
) -> tuple[str, tuple[str | Picture, ...]]:
    """The text, and texts and pictures in their order where there are pictures."""
    if content is None and may_be_absent:
        return "", ()
    if isinstance(content, str):
        return content, ()
    if not isinstance(content, list) or not content:
        raise InputError(f"{where} must be text, found {shorten(content)}")
    texts: list[str] = []
    parts: list[str | Picture] = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            parts.append(part_of_image(part, where))
            continue
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise InputError(f"{where} must be text, found a part that is none: {shorten(kind)}")
        if part.get("type", "text") != "text":
            raise InputError(f"{where} must be text, found a part of type {shorten(part['type'])}")
        texts.append(part["text"])
        parts.append(part["text"])
        note_left_out((name for name in part if name not in ("type", "text")), left_out, f"{path}.")
    shows = any(isinstance(part, Picture) for part in parts)
    return "".join(texts), tuple(parts) if shows else ()


def _tool_calls(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """The calls with their arguments as objects, as chat templates take them; OpenAI writes text."""
    if isinstance(value, str) and value.strip():
        value = parse_json(value.encode("utf-8", "surrogatepass"), f"{where}: tool_calls")
    if value in NOTHING:
        return ()
    if not isinstance(value, list):
        raise InputError(f"{where}: tool_calls must be a list, found {shorten(value)}")
    return tuple(_tool_call(call, where) for call in value)


def _tool_call(call: object, where: str) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or "name" not in function:
        raise InputError(
            f"{where}: tool_calls must hold functions with name and arguments, found {shorten(call)}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments.encode("utf-8", "surrogatepass"), f"{where}: arguments")
    called = {**function, "arguments": {} if arguments in (None, "") else arguments}
    return {**call, "function": called} if "function" in call else {"type": "function", "function": called}


def _spoken_calls(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """ShareGPT's function_call: JSON text of one call or of a list of them."""
    if isinstance(value, str):
        value = parse_json(value.encode("utf-8", "surrogatepass"), f"{where}: function_call")
    return _tool_calls(value if isinstance(value, list) else [value], where)
