"""Limits are those of `plan`: the longest, the smallest and the possible are what plan then finds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from planner.answers.plan import Plan
from planner.cli import COMMANDS
from planner.commands.program import run_command
from planner.gpus.target import resolve_gpu
from planner.models.catalog import list_models, load_shipped
from planner.planning import comparison
from planner.planning.comparison import largest_models, smallest_cards
from planner.planning.make_plan import make_plan
from planner.search.evaluator import Evaluator
from planner.search.lean import longest_that_fits
from planner.setup.cuda_allocator import VARIABLE
from planner.setup.request import make_request
from planner.setup.training_setup import METHODS

PAIRS = (
    ("llama-3.1-8b", "12GB"),
    ("qwen2.5-14b", "16GB"),
    ("qwen2.5-32b", "24GB"),
    ("gemma-2-9b", "l4"),
    ("smollm2-135m", "8GB"),
    ("llama-3.1-70b", "24GB"),
    ("phi-4", "t4"),
)


def plan_of(model: str, gpu: str, **knobs: Any) -> Plan:
    return make_plan(make_request(model, gpu=gpu, knobs=knobs), whole=False)


@pytest.mark.parametrize(("model", "gpu"), PAIRS)
def test_the_longest_context_fits_and_none_longer_does(model: str, gpu: str) -> None:
    plan = make_plan(make_request(model, gpu=gpu), longest=True, whole=False)
    window = load_shipped(model).max_position_embeddings
    if plan.longest is None:
        assert not plan_of(model, gpu, max_length=min(512, window)).fits
        return
    length = plan.longest.max_length
    there = plan_of(model, gpu, max_length=length)
    assert there.fits
    assert there.setup == plan.longest.setup
    assert there.memory.peak_upper_bytes == plan.longest.peak_upper_bytes
    assert plan.longest.reaches_model_limit is (length == window)
    if length + 512 <= window:
        assert not plan_of(model, gpu, max_length=length + 512).fits


def test_a_fixed_knob_bounds_the_longest_context() -> None:
    free = make_plan(make_request("llama-3.1-8b", gpu="12GB"), longest=True, whole=False).longest
    knobs = {"activation_offloading": False, "per_device_train_batch_size": 2}
    bound = make_plan(
        make_request("llama-3.1-8b", gpu="12GB", knobs=knobs), longest=True, whole=False
    ).longest
    assert free is not None
    assert bound is not None
    assert bound.max_length < free.max_length
    assert (bound.setup.activation_offloading, bound.setup.per_device_train_batch_size) == (False, 2)


def test_the_longest_context_is_in_the_headline_and_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "qwen2.5-14b", "--gpu", "16GB", "--longest"]
    assert run_command("plan", COMMANDS["plan"], [*asked, "--json"]) == 0
    longest = json.loads(capsys.readouterr().out)["longest"]
    assert longest["setup"]["max_length"] == longest["max_length"]
    assert run_command("plan", COMMANDS["plan"], asked) == 0
    headline = " ".join(capsys.readouterr().out.split("\n\n")[0].split())
    length = longest["max_length"]
    assert f"Longest: {length:,} tokens, more do not fit (" in headline
    assert f"--max-length {length})." in headline


def test_the_longest_is_looked_for_beyond_a_length_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen otherwise: 16,512 tokens were the longest, and 17,024 fitted."""
    monkeypatch.setenv(VARIABLE, "expandable_segments:False")
    longest = make_plan(make_request("falcon3-3b", gpu="8GB"), longest=True, whole=False).longest
    assert longest is not None
    assert not plan_of("falcon3-3b", "8GB", max_length=16064).fits
    assert longest.max_length > 16064
    assert plan_of("falcon3-3b", "8GB", max_length=longest.max_length).fits
    assert not plan_of("falcon3-3b", "8GB", max_length=longest.max_length + 512).fits


def test_the_largest_models_of_a_card_are_as_long_as_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [one for one in list_models() if one.id in ("llama-3.2-3b", "qwen2.5-7b")]
    monkeypatch.setattr(comparison, "list_models", lambda: models)
    target = resolve_gpu("8GB")
    base = make_request("any").setup(max_length=512, gradient_accumulation_steps=16, dtype=target.spec.dtype)
    found = {one.model: one for one in largest_models(target, base, fixed={}).models}
    for model in ("llama-3.2-3b", "qwen2.5-7b"):
        spec = load_shipped(model)
        evaluator = Evaluator(spec, target.spec, target.usable_bytes)
        asked = make_request(model).setup(max_length=512, dtype=target.spec.dtype)
        alone = longest_that_fits(asked, evaluator, effective_batch_size=16, fixed={}, start_length=512)
        assert found[model].max_length == alone
        assert plan_of(model, "8GB", max_length=alone).fits


def test_the_smallest_card_takes_what_a_smaller_one_does_not() -> None:
    """Seen the other way: 4,096 tokens of qwen2.5-32b were said to want 32 GB where plan fits 24."""
    model = load_shipped("qwen2.5-32b")
    base = make_request("qwen2.5-32b").setup(max_length=512, gradient_accumulation_steps=16)
    (card,) = smallest_cards(base, model, ("qlora",), fixed={}, given_length=4096)
    assert card.gpu is not None
    assert card.usable_bytes is not None
    assert card.usable_bytes < resolve_gpu("rtx-4090").usable_bytes
    assert plan_of("qwen2.5-32b", card.gpu, max_length=4096).fits


@pytest.mark.parametrize(("model", "gpu"), [("llama-3.1-8b", "24GB"), ("qwen2.5-14b", "16GB")])
def test_a_method_is_said_to_fit_where_its_own_plan_does(model: str, gpu: str) -> None:
    """Seen the other way: a 16-bit LoRA of llama-3.1-8b was said not to fit 24 GB."""
    plan = make_plan(make_request(model, gpu=gpu))
    assert [one.method for one in plan.methods] == list(METHODS)
    for figures in plan.methods:
        own = plan_of(model, gpu, method=figures.method)
        assert own.fits is figures.fits, figures.method
