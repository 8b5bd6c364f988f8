"""A row of every kind in docs/data.md: what is read, and what is refused with which reason."""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "Four."}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
RESULT = {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"}
ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}

READ: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "messages with a system turn": {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]},
    "role developer": {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]},
    "key system beside messages": {"system": "Be brief.", "messages": [USER, ANSWER]},
    "tools": {"messages": [USER, ANSWER], "tools": [TOOL]},
    "tool_calls": {
        "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, ANSWER],
        "tools": [TOOL],
    },
    "empty or null tool_calls": {"messages": [USER, {**ANSWER, "tool_calls": [], "function_call": None}]},
    "reasoning_content": {"messages": [USER, {**ANSWER, "reasoning_content": "Two and two."}]},
    "thinking or reasoning": {"messages": [USER, {**ANSWER, "thinking": "Two and two.", "reasoning": ""}]},
    "weight": {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
    "content in parts of text": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]
    },
    "ShareGPT conversations": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    },
    "ShareGPT with system and tools": {
        "system": "Be brief.",
        "tools": "[]",
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "Four."},
        ],
    },
    "prompt and completion": {"prompt": "2+2=", "completion": " 4"},
    "prompt and completion of turns": {"prompt": [USER], "completion": [ANSWER], "tools": [TOOL]},
    "Alpaca": ALPACA,
    "Alpaca without input": {"instruction": "Sing.", "output": "La"},
    "Alpaca with system and history": {**ALPACA, "system": "Be brief.", "history": [["Hi", "Hello"]]},
    "question and answer": {"question": "2+2?", "answer": "Four."},
    "text": {"text": "Once upon a time"},
}
"""Rows that are trained, by their name in docs/data.md."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "preference pairs": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data"),
    "preference pairs of turns": ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "preference data"),
    "KTO": ({"prompt": "a", "completion": "b", "label": False}, "good and bad"),
    "prompts without answers": ({"prompt": "a"}, "without an answer"),
    "videos and sound": ({"messages": [USER, ANSWER], "videos": ["a.mp4"]}, "videos and sound"),
    "images beside text": ({"text": "a cat", "images": ["a.png"]}, "images are shown in turns"),
    "images that are no files here": (
        {"messages": [USER, ANSWER], "images": ["https://example.org/a.png"]},
        "is no file of this machine",
    ),
    "parts that are no text": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ANSWER]},
        "'input_audio'",
    ),
    "last turn from the user": ({"messages": [USER, ANSWER, USER]}, "no answer to learn"),
    "weight other than 0 and 1": ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight 0.5"),
    "function_call": (
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": "add"}}]},
        "tool_calls",
    ),
    "chat_template_kwargs": (
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs is not read",
    ),
    "tools or system beside text": ({"text": "a", "system": "Be brief."}, "system is not read beside text"),
    "input and output": ({"input": "a", "output": "b"}, "name them prompt and completion"),
    "Axolotl's segments": ({"segments": [{"label": True, "text": "a"}]}, "segments"),
    "input_ids": ({"input_ids": [1, 2], "labels": [1, 2]}, "tokens instead of text"),
    "half a character": ({"text": "a \ud83d b"}, "half of a character at character 3"),
}
"""Rows that are refused, and what the line says."""
