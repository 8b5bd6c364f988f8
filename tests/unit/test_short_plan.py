"""The short page of a plan: one page, nothing that the full one does not say, and bars for any terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from planner.answers.plan import Plan
from planner.planning.make_plan import make_plan
from planner.setup.request import make_request
from planner.text.plan import print_plan
from planner.text.short import MOST_LINES, print_short

Cli = Callable[..., Any]
FIGURE = re.compile(r"\d[\d,.]*")
ASKED = (
    ("qwen2.5-14b", "16GB", {}),
    ("llama-3.1-8b", "rtx-4090", {"use_dora": True, "use_rslora": True, "lora_dropout": 0.05}),
    (
        "qwen2.5-32b",
        "2x24GB",
        {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
    ),
    ("llama-3.1-70b", "8GB", {"prepare_for_kbit_training": True, "kernels": "liger"}),
    ("llama-3.2-1b", "h200", {"method": "full"}),
    ("qwen2.5-0.5b", "p100-16gb", {}),
)


def _page(plan: Plan, *, full: bool, width: int = 80) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False, emoji=False, markup=False)
    (print_plan if full else print_short)(out, plan)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


@pytest.mark.parametrize(
    ("model", "gpu", "knobs"), ASKED, ids=lambda one: one if isinstance(one, str) else ""
)
def test_it_is_one_page_and_all_its_figures_are_on_the_full_one(
    model: str, gpu: str, knobs: dict[str, object]
) -> None:
    plan = make_plan(make_request(model, gpu=gpu, knobs=knobs))
    short, full = (_page(plan, full=full) for full in (False, True))
    assert len(short.splitlines()) <= MOST_LINES
    # What starts it quotes what was asked, which is no figure of the plan.
    said = re.sub(r"train it.*?(?=\n  \S|\n\n)", "", short, flags=re.DOTALL)
    assert set(FIGURE.findall(said)) <= set(FIGURE.findall(full))
    for part in ("\nSetup" if plan.fits else "\nSmallest setup", "\nMemory", "\nNext", "--full"):
        assert part in short


def test_what_starts_it_repeats_what_was_asked(cli: Cli) -> None:
    out = cli("plan", "--model", "qwen2.5-0.5b", "--gpu", "16GB", "--lora-r", "8", "--epochs", "2").out
    assert "vramwise train --model qwen2.5-0.5b --lora-r 8 --epochs 2 --data FILE" in " ".join(out.split())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("more", [(), ("--full",)])
def test_bars_are_of_signs_that_the_terminal_has(
    encoding: str, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding, errors="replace", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    from planner.cli import COMMANDS
    from planner.commands.program import run_command

    arguments = ["--model", "qwen2.5-0.5b", "--gpu", "16GB", *more]
    assert run_command("plan", COMMANDS["plan"], arguments) == 0
    text = written.getvalue().decode(encoding)
    assert "?" not in text
    assert ("#####" in text, "█" in text) == ((False, True) if encoding == "utf-8" else (True, False))
