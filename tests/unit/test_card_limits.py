"""What a card cannot run is refused in a line, and what a run on it needs of torch is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.base.errors import InputError
from planner.gpus.catalog import gpu_catalog
from planner.setup.card_limits import BFLOAT16, CARD_LIMITS, DEFAULT_BUILD, refuse_on_card, torch_build

KNOBS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "knobs.md"
Cli = Callable[..., Any]

REFUSED = (
    ("t4", ("--attn-implementation", "flash_attention_2"), "8.0", "7.5"),
    ("rtx-2080-ti", ("--attn-implementation", "flash_attention_2"), "8.0", "7.5"),
    ("v100-16gb", ("--attn-implementation", "flash_attention_2"), "8.0", "7.0"),
    ("p100-16gb", ("--compile", "regional"), "7.0", "6.0"),
    ("p100-16gb", ("--kernels", "liger"), "7.0", "6.0"),
    ("gtx-1080-ti", ("--attn-implementation", "flex_attention"), "7.0", "6.1"),
    ("t4", ("--dtype", "bfloat16"), "8.0", "7.5"),
)
ACCEPTED = (
    ("rtx-3090", ("--attn-implementation", "flash_attention_2")),
    ("v100-16gb", ("--compile", "regional")),
    ("t4", ("--kernels", "liger")),
    ("t4", ("--dtype", "float16")),
    ("p100-16gb", ("--compile", "none")),
)


@pytest.mark.parametrize(("gpu", "knob", "needed", "has"), REFUSED)
def test_a_knob_that_the_card_cannot_run_is_one_line(
    gpu: str, knob: tuple[str, str], needed: str, has: str, cli: Cli
) -> None:
    done = cli("plan", "--model", "llama-3.2-1b", "--gpu", gpu, *knob)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    name = knob[0].strip("-").replace("-", "_")
    assert f"{name}={knob[1]} needs compute capability {needed}" in done.err
    assert f"{gpu} has {has}" in done.err


@pytest.mark.parametrize(("gpu", "knob"), ACCEPTED)
def test_a_knob_that_it_can_run_is_planned(gpu: str, knob: tuple[str, str], cli: Cli) -> None:
    assert cli("plan", "--model", "llama-3.2-1b", "--gpu", gpu, "--max-length", "512", *knob).code == 0


def test_a_line_of_estimate_is_refused_alike(cli: Cli, tmp_path: Path) -> None:
    setup = {"model": "llama-3.2-1b", "max_length": 512, "dtype": "float16"}
    lines = tmp_path / "setups.jsonl"
    lines.write_text(json.dumps({**setup, "attn_implementation": "flash_attention_2"}) + "\n")
    done = cli("estimate", "--gpu", "t4", "--setups", lines)
    assert done.code == 2
    assert "needs compute capability 8.0" in done.err


@pytest.mark.parametrize("gpu", gpu_catalog().gpus, ids=lambda gpu: gpu.id)
def test_a_card_without_kernels_in_the_default_build_is_told_which_has_them(gpu: Any) -> None:
    said = torch_build(gpu)
    assert (said is None) == (gpu.compute_capability >= DEFAULT_BUILD)


@pytest.mark.parametrize("more", [(), ("--full",)])
def test_both_pages_tell_which_build(more: tuple[str, ...], cli: Cli) -> None:
    for gpu, capability in (("p100-16gb", "6.0"), ("v100-16gb", "7.0")):
        done = cli("plan", "--model", "llama-3.2-3b", "--gpu", gpu, *more)
        said = " ".join(done.out.split())
        assert done.code == 0
        assert f"the default build has no kernels for {gpu} (compute capability {capability})" in said
        assert "CUDA 12.6" in said
    assert "no kernels" not in cli("plan", "--model", "llama-3.2-3b", "--gpu", "t4", *more).out


def test_the_page_of_knobs_lists_the_cards_that_refuse_them() -> None:
    lines = KNOBS_PAGE.read_text(encoding="utf-8").partition("\n## Cards\n")[2].splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    limits = (*CARD_LIMITS, BFLOAT16)
    assert [(row[0], row[1]) for row in rows] == [(limit.knob, limit.value) for limit in limits]
    for knob, value, capability, _, listed in rows:
        for gpu in gpu_catalog():
            if gpu.id in listed.split(", "):
                with pytest.raises(InputError, match=f"needs compute capability {capability}"):
                    refuse_on_card({knob: value}, gpu, limits)
            else:
                refuse_on_card({knob: value}, gpu, limits)


def test_the_search_chooses_nothing_that_the_card_refuses(cli: Cli) -> None:
    for gpu in ("p100-16gb", "t4"):
        plan = json.loads(cli("plan", "--model", "llama-3.2-1b", "--gpu", gpu, "--json").out)
        assert all(plan["setup"][limit.knob] != limit.value for limit in CARD_LIMITS[:2])
        assert plan["setup"]["compile"] == "none" or gpu == "t4"
