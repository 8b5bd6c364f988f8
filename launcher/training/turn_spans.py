"""Where a turn lies in the text that a chat template makes of a conversation.

Few templates say where a turn begins and ends (by TRL's generation markers). It is told by rendering: the
turns before it, the same with the prompt for an answer, and the turns up to it. Where these are not how
the whole conversation begins, because a template renders earlier turns otherwise once there are later ones
(Qwen 3 takes out their reasoning), the turn is rendered with a mark for its content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Turns = Sequence[dict[str, Any]]
Render = Callable[[Turns, bool], str | None]
"""Turns and whether a prompt for an answer follows, to text; None where the template refuses those turns."""
# Private use characters: no template writes them, no text should hold them.
MARK = "\ue0f0\ue0f1\ue0f2"


def assistant_span(render: Render, turns: Turns, place: int, whole: str) -> tuple[int, int] | None:
    """(first, behind the last) character of what the assistant writes in its turn, end of turn included.

    None where the template's text does not tell it apart.
    """
    asked, answered = render(turns[:place], True), render(turns[: place + 1], False)
    if asked is None or answered is None or not (whole.startswith(asked) and answered.startswith(asked)):
        return _marked_span(render, turns, place, whole)
    if not whole.startswith(answered):
        return _marked_span(render, turns, place, whole)
    return len(asked), max(len(asked), len(answered.rstrip()))


def other_span(render: Render, turns: Turns, place: int, whole: str) -> tuple[int, int] | None:
    """The same of a turn that is not the assistant's, with all that the template writes around it."""
    before = render(turns[:place], False) if place else ""
    up_to = render(turns[: place + 1], False)
    if before is None or up_to is None or not whole.startswith(up_to) or not up_to.startswith(before):
        return None
    return len(before), len(up_to)


def _marked_span(render: Render, turns: Turns, place: int, whole: str) -> tuple[int, int] | None:
    marked_turn = {**turns[place], "content": MARK}
    marked = render([*turns[:place], marked_turn, *turns[place + 1 :]], False)
    if marked is None or marked.count(MARK) != 1:
        return None
    content = marked.index(MARK)
    behind = marked[content + len(MARK) :]
    if not (whole.startswith(marked[:content]) and whole.endswith(behind)):
        return None
    content_end = len(whole) - len(behind)
    if content_end < content:
        return None
    start = _start(render, turns, place, marked, content)
    last = render([*turns[:place], marked_turn], False)
    if start is None or last is None or last.count(MARK) != 1:
        return None
    end_of_turn = _end_of_turn(last[last.index(MARK) + len(MARK) :].rstrip(), behind)
    return None if end_of_turn is None else (start, content_end + len(end_of_turn))


def _end_of_turn(of_last: str, behind: str) -> str | None:
    """What ends the turn, of what does so where the turn is the last.

    Some templates end the conversation with a token more (Phi-3): what is common is then the turn's, if it
    is whole tokens, whose names end in a bracket. Nothing in common is no end of turn (GPT-OSS).
    """
    if behind.startswith(of_last):
        return of_last
    common = of_last[: _common_length(of_last, behind)]
    whole_tokens = max(common.rfind(bracket) for bracket in ">]}") + 1
    return common[:whole_tokens] or None


def _start(render: Render, turns: Turns, place: int, marked: str, content: int) -> int | None:
    """Where the prompt for the answer ends in the text with the mark."""
    before, asked = render(turns[:place], False), render(turns[:place], True)
    if asked is not None and marked.startswith(asked):
        return len(asked)
    if before is None or asked is None or not asked.startswith(before):
        return None
    prompt = asked[len(before) :]
    if marked.startswith(before):
        common = _common_length(prompt, marked[len(before) : content])
        return len(before) + common if common or not prompt else None
    at = marked.rfind(prompt, 0, content) if prompt else -1
    return at + len(prompt) if at >= 0 else None


def _common_length(first: str, second: str) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
