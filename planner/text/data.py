"""What of a Plan's data is trained and what is not, as text: for both pages and the terminal interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.answers.plan import DataSummary, Plan
from planner.text.figures import heading, pairs

if TYPE_CHECKING:
    from rich.console import Console

_FORMATS = {
    "messages": "conversations",
    "prompt_completion": "prompts with completions",
    "text": "texts",
}
_KEYS_ON_A_LINE = 4


def print_data(out: Console, plan: Plan) -> None:
    """Print the data's lengths and what of it is not trained; nothing where there is no data."""
    if plan.data is not None:
        heading(out, "Data")
        pairs(out, data_lines(plan.data))


def data_lines(data: DataSummary) -> Iterator[tuple[str, str]]:
    """All that is known of the data."""
    yield "from", data.path
    counted = "estimated from the text's size" if data.estimated else "of the model's own tokenizer"
    yield "examples", f"{data.examples:,} {_FORMATS.get(data.format, data.format)}"
    yield (
        "tokens",
        f"{data.total_tokens:,}, {counted}; longest {data.longest:,}, 99% at most {data.percentile_99:,}",
    )
    whole = f"{data.covered_percent:.3g}% of the examples"
    if data.truncated_examples:
        lost = data.truncated_tokens / data.total_tokens
        whole += (
            f"; {data.truncated_examples:,} are cut, losing {data.truncated_tokens:,} tokens ({lost:.2%})"
        )
    yield "whole", whole
    for note in data.notes:
        yield "not trained", note
    if data.left_out:
        yield "left out", f"keys of which nothing is made: {', '.join(data.left_out)}"


def not_trained(data: DataSummary) -> str:
    """What is cut, not trained and left out, in a line; empty where all of the data is trained."""
    found = []
    if data.truncated_examples:
        found.append(f"{data.truncated_examples:,} of {data.examples:,} examples are cut")
    found += data.notes
    if data.left_out:
        shown, more = data.left_out[:_KEYS_ON_A_LINE], len(data.left_out) - _KEYS_ON_A_LINE
        found.append(f"left out: {', '.join(shown)}" + (f" and {more} more keys" if more > 0 else ""))
    return "; ".join(found)
