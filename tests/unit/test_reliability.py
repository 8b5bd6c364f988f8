"""docs/reliability.md: its exit codes are the program's, its limits the keeper's, its proofs are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.runs.ends import END_STATES, RUN_ENDS, RunExit, exit_code
from launcher.runs.keeper import HANG_RESTARTS, SAMPLER_RESTARTS
from launcher.runs.minding.hang import HangLimits
from launcher.runs.minding.stopping import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def ends_table() -> str:
    rows = [f"| {end.state} | {int(end.code)} | {end.meaning} |" for end in RUN_ENDS]
    return "\n".join(["| state | exit code | meaning |", "|---|---|---|", *rows])


def test_the_exit_codes_of_the_page_are_those_of_the_program() -> None:
    assert f"<!-- ends -->\n{ends_table()}\n<!-- end of ends -->" in PAGE, ends_table()


def test_only_a_finished_run_is_a_success() -> None:
    assert [state for state in END_STATES if exit_code(state) == 0] == ["finished"]
    assert len(set(END_STATES)) == len(END_STATES)
    assert exit_code("a state of another version") == RunExit.BUG


def test_the_limits_of_the_page_are_those_of_the_keeper() -> None:
    limits = HangLimits()
    assert limits.saving_seconds == limits.compiling_seconds
    told = (
        f"| {limits.floor_seconds:.0f} s, or {limits.factor:.0f} times",
        f"; {limits.unmeasured_seconds / 60:.0f} min until five are known |",
        f"saving | {limits.saving_seconds / 60:.0f} min |",
        f"loading | {limits.loading_seconds / 60:.0f} min |",
        f"SIGKILL follows after {PATIENCE_SECONDS:.0f} s",
    )
    for words in told:
        assert words in PAGE
    assert (HANG_RESTARTS, SAMPLER_RESTARTS, limits.known_after) == (3, 3, 5)
    assert "after three restarts without a new checkpoint" in PAGE


@pytest.mark.parametrize(
    "proof", sorted(set(re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)(?:::(\w+))?`", PAGE)))
)
def test_a_proof_that_the_page_names_is_there(proof: tuple[str, str]) -> None:
    file, test = proof
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not test or f"def {test}(" in text


def test_every_promise_names_a_proof() -> None:
    table = PAGE[PAGE.index("| promise | proof |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 30
    for row in table:
        assert "`tests/" in row or "`benchmarks/" in row, row
