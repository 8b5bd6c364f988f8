"""Tables as a narrow terminal shows them: no number is cut, nothing is lost."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from planner.text.figures import columns

HEADS = (
    ("card", "name"),
    ("peak GiB", "number"),
    ("tokens/s", "number"),
    ("fits", "text"),
    ("card to rent", "name"),
)
ROWS = (
    ("rtx-5060-ti-16gb", "15.08", "1,413", "yes, with checkpoints of every layer", "v100-32gb"),
    ("rtx-pro-6000", "194.56", "334", "no", "h200"),
)


def printed(width: int) -> str:
    out = io.StringIO()
    columns(Console(file=out, width=width, highlight=False, markup=False), HEADS, ROWS)
    return out.getvalue()


@pytest.mark.parametrize("width", range(12, 121, 3))
def test_no_cell_or_head_is_cut_at_any_width(width: int) -> None:
    text = printed(width)
    assert all(len(line) <= width for line in text.splitlines())
    for row in ROWS:
        for number in row[1:3]:
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d.,])", text), (number, text)
    shown = sorted(re.sub(r"\s", "", text))
    told = sorted(re.sub(r"\s", "", "".join(title for title, _ in HEADS) + "".join(map("".join, ROWS))))
    for letter in set(told):
        assert shown.count(letter) >= told.count(letter), (letter, text)


def test_the_heads_of_numbers_are_broken_before_names() -> None:
    lines = printed(63).splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["peak"],
        ["card", "GiB", "tokens/s", "fits", "card", "to", "rent"],
    ]
    assert any(line.split()[:2] == ["rtx-5060-ti-16gb", "15.08"] for line in lines)


def test_rows_are_blocks_where_the_numbers_alone_are_too_wide() -> None:
    assert ["peak", "GiB", "15.08"] in [line.split() for line in printed(40).splitlines()]
