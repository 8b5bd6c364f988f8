"""Outputs as committed, at 80 columns. VRAMWISE_UPDATE_GOLDEN=1 writes them anew: read what differs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from planner.setup.cuda_allocator import EXPANDABLE_SETTING, VARIABLE

OUTPUTS = Path(__file__).parent / "outputs"
ROOT = Path(__file__).parents[2]
SETUPS = "tests/golden/setups.jsonl"
DATA = "profiles/demo/data/train.jsonl"
"""Both from the root, where the commands are run: a page quotes the path, which is to be as long anywhere."""

FIGURE = re.compile(r"\d[\d,.]*")
PLANS: dict[str, tuple[str, ...]] = {
    "plan-fits": ("plan", "--model", "qwen2.5-14b", "--gpu", "16GB"),
    "plan-data": (*("plan", "--model", "llama-3.2-1b", "--gpu", "rtx-4090"), *("--data", DATA)),
    "plan-does-not-fit": ("plan", "--model", "llama-3.1-70b", "--gpu", "24GB"),
    "plan-experts": ("plan", "--model", "qwen3-30b-a3b", "--gpu", "80GB"),
    "plan-experts-too-large": ("plan", "--model", "qwen3-30b-a3b", "--gpu", "16GB"),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "help": ("--help",),
    "plan-help": ("plan", "--help"),
    **PLANS,
    **{f"{name}-full": (*arguments, "--full") for name, arguments in PLANS.items()},
    "plan-explain-experts": (*PLANS["plan-experts"], "--explain"),
    "estimate": ("estimate", "--gpu", "24GB", "--setups", SETUPS),
    "estimate-json": ("estimate", "--gpu", "24GB", "--setups", SETUPS, "--json"),
    "compare-pairs": (
        *("compare", "--model", "llama-3.1-8b", "--model", "qwen2.5-14b"),
        *("--gpu", "12GB", "--gpu", "rtx-4090"),
    ),
    "compare-model": ("compare", "--model", "mistral-nemo-12b"),
    "compare-gpu": ("compare", "--gpu", "16GB"),
}
# As where the launcher starts runs with it, on whatever system the tests run.
ALLOCATOR = {VARIABLE: EXPANDABLE_SETTING}
# argparse words its help differently from Python 3.13 on.
WORDED_BY_PYTHON = ("help", "plan-help")


def output_of(arguments: tuple[str, ...]) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *arguments],
        env={**environment, **ALLOCATOR, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONUTF8": "1"},
        cwd=ROOT,
        capture_output=True,
        timeout=500,
        check=False,
    )
    assert done.stderr == b""
    return f"exit code {done.returncode}\n" + done.stdout.decode("utf-8")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "compare-gpu" else ()) for name in COMMANDS],
)
def test_output_is_as_committed(name: str) -> None:
    if name in WORDED_BY_PYTHON and sys.version_info >= (3, 13):
        pytest.skip("help is compared where it was written, on Python 3.11 and 3.12")
    path = OUTPUTS / f"{name}.txt"
    now = output_of(COMMANDS[name])
    if os.environ.get("VRAMWISE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(now, encoding="utf-8")
    assert now == path.read_text(encoding="utf-8")


def test_no_output_is_left_over() -> None:
    assert {path.stem for path in OUTPUTS.glob("*.txt")} == set(COMMANDS)


def test_setups_of_the_golden_estimate_are_distinct() -> None:
    lines = (ROOT / SETUPS).read_text(encoding="utf-8").splitlines()
    assert len({json.dumps(json.loads(line), sort_keys=True) for line in lines}) == len(lines)


@pytest.mark.parametrize("name", PLANS)
def test_a_short_plan_is_a_page_and_says_nothing_that_the_full_one_does_not(name: str) -> None:
    short, full = (
        (OUTPUTS / f"{each}.txt").read_text(encoding="utf-8").partition("\n")[2]
        for each in (name, f"{name}-full")
    )
    assert len(short.splitlines()) <= 30
    assert max(map(len, short.splitlines())) <= 80
    assert set(FIGURE.findall(short)) <= set(FIGURE.findall(full))
