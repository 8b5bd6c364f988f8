"""The table of docs/claims.md: `python -m benchmarks.guide_claims`, what guides state beside what is so.

Reads profiles/guide_claims.csv through the room that `vramwise check` reads tables with.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.base.data_files import PROFILES
from planner.claims.claim import JudgedClaim
from planner.claims.judge import judge
from planner.claims.table import read_table
from planner.text.claims import true_figure

CLAIMS = PROFILES / "guide_claims.csv"
_HEAD = """| claim | model, method, length | stated | verdict | true | why |
| --- | --- | --- | --- | --- | --- |
"""


def judged() -> tuple[JudgedClaim, ...]:
    """Every claim of the file, judged."""
    return tuple(judge(one) for one in read_table(CLAIMS, knobs={}, model=None, gpu=None))


def table() -> str:
    """A row for each figure of each claim."""
    return _HEAD + "".join(line for one in judged() for line in _rows(one))


def _rows(one: JudgedClaim) -> Iterator[str]:
    knobs = dict(one.claim.knobs)
    setup = f"{one.claim.model}, {knobs['method']}, {knobs['max_length']:,}"
    for at, figure in enumerate(one.figures):
        cells = (figure.figure.written, figure.verdict, true_figure(figure), figure.reason)
        first = (one.claim.text, setup) if at == 0 else ("", "")
        yield f"| {' | '.join((*first, *cells))} |\n"


if __name__ == "__main__":
    print(table(), end="")
