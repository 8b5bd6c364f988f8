"""A tokenizer's chat template: what it renders of conversations, and which tokens are to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.models.limits import LimitError, limited
from launcher.training.turn_spans import Turns, assistant_span, other_span
from planner.base.errors import InputError, shorten
from planner.data.reader import Conversation, TrainingData
from planner.data.turns import REASONING

if TYPE_CHECKING:
    from launcher.training.images.tokens import ImageTokens

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
# Examples that are looked at for one in which a template renders what it may leave out.
LOOKED_AT = 50
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template raises beside jinja's own errors: it computes with whatever the data holds."""


class ChatTemplate:
    """A tokenizer's chat template, and which of the tokens that it makes are to be learned."""

    def __init__(self, tokenizer: Any, assistant_only: bool, images: ImageTokens | None = None) -> None:
        self.tokenizer = tokenizer
        self._images = images
        self._assistant_only = assistant_only
        source = str(tokenizer.chat_template)
        self._knows_developer = "developer" in source
        self._marked = "generation %}" in source.replace("generation-%}", "generation %}")

    def turns(self, example: Conversation) -> list[dict[str, Any]]:
        """The turns as the template takes them; developer is system where it knows no developer."""
        turns = [message.to_dict() for message in example.messages]
        for turn in turns:
            if turn["role"] == "developer" and not self._knows_developer:
                turn["role"] = "system"
        return turns

    def rendered(
        self, turns: Turns, example: Conversation, where: str, asking: bool = False, **options: Any
    ) -> Any:
        """What the template makes of turns and tools: text, unless `options` say otherwise.

        Raises:
            InputError: it refuses them, or takes more time or memory than it may (LimitError).
        """
        from jinja2 import TemplateError

        chosen = {"tokenize": False, **options}
        tools = [dict(tool) for tool in example.tools] or None
        try:
            with limited(f"{where}: the chat template"):
                made = self.tokenizer.apply_chat_template(
                    list(turns), tools=tools, add_generation_prompt=asking, **chosen
                )
            # A part of the turns shows the first of the pictures.
            if self._images is None or not isinstance(made, str):
                return made
            return self._images.expanded(made, example.pictures, where)
        except InputError:
            raise
        except (*_REFUSALS, TemplateError) as error:
            raise InputError(f"{where}: the chat template refuses it: {shorten(str(error), 120)}") from error

    def learned(
        self, example: Conversation, turns: Turns, whole: str, offsets: Sequence[tuple[int, int]], where: str
    ) -> list[bool] | None:
        """Whether each token is to be learned, so far as turns decide; None where all are.

        Raises:
            InputError: a turn is not told apart in the template's text.
        """
        untrained = [place for place, message in enumerate(example.messages) if not message.trained]
        if not untrained and not self._assistant_only:
            return None
        learned = [True] * len(offsets)
        if self._assistant_only and self._marked and not example.pictures:
            made = self.rendered(
                turns, example, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            learned = [bool(bit) for bit in made["assistant_masks"]]
        elif self._assistant_only:
            answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
            spans = [self._span(example, turns, place, whole, where) for place in answers]
            learned = _within(offsets, spans)
        masked = _within(offsets, [self._span(example, turns, place, whole, where) for place in untrained])
        return [keep and not hidden for keep, hidden in zip(learned, masked, strict=True)]

    def _span(
        self, example: Conversation, turns: Turns, place: int, whole: str, where: str
    ) -> tuple[int, int]:
        def render(some: Turns, asking: bool) -> str | None:
            try:
                return str(self.rendered(some, example, where, asking))
            except LimitError:
                raise
            except InputError:
                return None

        find = assistant_span if turns[place]["role"] == "assistant" else other_span
        found = find(render, turns, place, whole)
        if found is None:
            raise InputError(
                f"{where}: message {place + 1}: the chat template's text does not tell this turn apart, "
                "which --assistant-only-loss and weight 0 need; mark it in the template with {% generation %}"
            )
        return found


def _within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens begin within one of the rising spans of characters."""
    found = [False] * len(offsets)
    rising = iter(spans)
    span = next(rising, None)
    for index, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(rising, None)
        if span is None:
            break
        found[index] = start >= span[0] and end > start
    return found


def not_rendered(data: TrainingData, tokenizer: Any) -> tuple[str, ...]:
    """A line for each of tools, calls and reasoning that the data holds and the template leaves out."""
    template = ChatTemplate(tokenizer, False)
    notes = []
    for key in ("tools", "tool_calls", *REASONING):
        holding = [
            (f"{data.source}: example {number}", example)
            for number, example in enumerate(data.examples, start=1)
            if isinstance(example, Conversation) and _holds(example, key)
        ]
        if holding and not any(_renders(template, example, key, at) for at, example in holding[:LOOKED_AT]):
            notes.append(
                f"{key} of {len(holding):,} examples are not trained: this model's chat template renders none"
            )
    return tuple(notes)


def _holds(example: Conversation, key: str) -> bool:
    if key == "tools":
        return bool(example.tools)
    return any(name == key for message in example.messages for name, _ in message.more)


def _renders(template: ChatTemplate, example: Conversation, key: str, where: str) -> bool:
    turns = template.turns(example)
    without = [{name: value for name, value in turn.items() if name != key} for turn in turns]
    toolless = Conversation(example.messages) if key == "tools" else example
    try:
        return bool(template.rendered(turns, example, where) != template.rendered(without, toolless, where))
    except LimitError:
        raise
    except InputError:
        return True  # it looks at the key, at least
