"""The choice for data of many lengths: how examples become batches, and what that does not trade."""

from __future__ import annotations

import random
from typing import Any

import pytest

from planner.answers.plan import Plan
from planner.base.errors import InputError
from planner.data.lengths import DatasetStats
from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.planning.asked import Asked
from planner.planning.make_plan import make_plan
from planner.search import SearchResult, Tried, finish_seconds, search
from planner.search.batches import MOST_OFF, packed_batches
from planner.search.evaluator import Evaluator
from planner.setup import defaults
from planner.setup.request import make_request
from planner.setup.training_setup import TrainingSetup
from planner.throughput.epoch import Examples

MODEL = "llama-3.1-8b"


def make_stats(lengths: list[int]) -> DatasetStats:
    return DatasetStats.from_lengths(
        lengths, loss_tokens=sum(lengths), loss_on="all", data_format="text", estimated=False
    )


def chat(count: int = 5000) -> DatasetStats:
    """From 50 to 4,000 tokens, most of them short."""
    rng = random.Random(3)
    return make_stats([min(4000, max(50, int(rng.lognormvariate(6.0, 0.9)))) for _ in range(count)])


def planned(stats: DatasetStats, gpu: str = "24GB", model: str = MODEL, **knobs: Any) -> Plan:
    return make_plan(make_request(model, gpu=gpu, data="chat.jsonl", knobs=knobs), stats=stats, whole=False)


def tried(stats: DatasetStats, gpu: str = "24GB", model: str = MODEL) -> tuple[Tried, ...]:
    """All that a plan for the data tried."""
    request = make_request(model, gpu=gpu, data="chat.jsonl")
    return Asked(request, resolve_gpu(gpu), resolve_model(model), stats).chosen.result.tried


def searched(stats: DatasetStats, fixed: dict[str, Any], effective: int = 16) -> SearchResult:
    target = resolve_gpu("24GB")
    evaluator = Evaluator(resolve_model(MODEL), target.spec, target.usable_bytes, examples=Examples(stats))
    base = TrainingSetup(model=MODEL, max_length=3328, **fixed)
    return search(base, evaluator, effective_batch_size=effective, fixed=fixed)


def test_chats_are_packed() -> None:
    plan = planned(chat())
    assert plan.setup.packing
    assert plan.fits
    assert plan.data is not None
    assert plan.data.covered_percent >= 99.0
    assert plan.duration is not None
    assert plan.duration.useful_tokens_per_second is not None
    padded = [one for one in tried(chat()) if "packed" not in one.strategy and one.fits]
    best = max(one.candidate.tokens_per_second or 0.0 for one in padded)
    assert plan.duration.useful_tokens_per_second > 1.2 * best


def test_grouping_by_length_is_done_where_it_is_asked_for() -> None:
    assert planned(chat(), packing=False).setup.train_sampling_strategy == "random"
    plan = planned(chat(), train_sampling_strategy="group_by_length")
    assert plan.setup.train_sampling_strategy == "group_by_length"
    assert plan.setup.effective_batch_size == 16


def test_examples_of_one_length_are_batched_as_they_come() -> None:
    stats = make_stats([500] * 4000)
    plan = planned(stats)
    assert not plan.setup.packing
    assert plan.setup.train_sampling_strategy == "random"
    assert {one.strategy.startswith(("packed", "grouped")) for one in tried(stats)} == {False}


@pytest.mark.parametrize(
    ("fixed", "packings", "samplings", "attentions"),
    [
        ({}, {True, False}, {"random"}, {None, "flex_attention"}),
        ({"packing": True}, {True}, {"random"}, {None, "flex_attention"}),
        ({"packing": False}, {False}, {"random"}, {None}),
        ({"train_sampling_strategy": "group_by_length"}, {False}, {"group_by_length"}, {None}),
        ({"train_sampling_strategy": "random"}, {True, False}, {"random"}, {None, "flex_attention"}),
        ({"attn_implementation": "sdpa"}, {True, False}, {"random"}, {"sdpa"}),
    ],
)
def test_what_is_fixed_is_kept_and_the_rest_is_tried(
    fixed: dict[str, Any], packings: set[bool], samplings: set[str], attentions: set[str | None]
) -> None:
    setups = [one.candidate.setup for one in searched(chat(), fixed).tried]
    assert {setup.packing for setup in setups} == packings
    assert {setup.train_sampling_strategy for setup in setups} == samplings
    assert {setup.attn_implementation for setup in setups} == attentions
    assert not any(setup.packing and setup.train_sampling_strategy != "random" for setup in setups)
    # Batches of many lengths are not compiled.
    assert all(setup.packing for setup in setups if setup.compile != "none")


def test_the_choice_is_done_first_of_all_that_was_tried() -> None:
    result = searched(chat(), {})
    assert result.chosen is not None
    chosen = finish_seconds(result.chosen.candidate, 10_000_000)
    times = [finish_seconds(one.candidate, 10_000_000) for one in result.tried if one.fits]
    assert chosen is not None
    assert chosen <= 1.01 * min(seconds for seconds in times if seconds is not None)


@pytest.mark.parametrize("effective", [1, 4, 16, 20, 64])
def test_packing_never_trades_the_effective_batch(effective: int) -> None:
    stats = chat()
    examples = Examples(stats)
    for one in searched(stats, {}, effective).tried:
        setup = one.candidate.setup
        if setup.packing:
            a_step = setup.effective_batch_size * examples.examples_per_row(setup)
            assert abs(a_step - effective) <= MOST_OFF * effective
        else:
            assert setup.effective_batch_size == effective


def test_rows_of_a_step_hold_about_the_examples_wished() -> None:
    found = packed_batches(16, 5.3, 1, {})
    assert [one.per_device_train_batch_size for one in found] == [1, 3]
    assert [one.gradient_accumulation_steps for one in found] == [3, 1]
    assert packed_batches(4, 5.3, 1, {}) == ()
    assert packed_batches(16, 5.3, 1, {"per_device_train_batch_size": 2}) == ()
    asked = packed_batches(4, 5.3, 1, {"packing": True})
    assert [one.per_device_train_batch_size for one in asked] == [1]


def test_the_plan_says_how_many_examples_a_step_has() -> None:
    plan = planned(chat())
    rows, per_row = plan.setup.effective_batch_size, plan.schedule.examples_per_row
    assert per_row is not None
    assert plan.schedule.effective_batch_size == round(rows * per_row)
    said = f"about {plan.schedule.effective_batch_size} examples a step: {rows} rows of {per_row:.3g}"
    assert any(said in text for text in plan.assumptions)
    assert plan.duration is not None
    assert plan.duration.steps == 3 * -(-chat().packing(plan.setup.max_length).sequences // rows)


def test_a_plan_of_data_reads_back() -> None:
    plan = planned(chat(800))
    assert Plan.from_dict(plan.to_dict()) == plan


def test_budgets_are_not_tried_with_dropout() -> None:
    def budgets(fixed: dict[str, Any]) -> set[float | None]:
        return {one.candidate.setup.activation_memory_budget for one in searched(chat(), fixed).tried}

    assert len(budgets({})) > 1
    assert budgets({"lora_dropout": 0.05}) == {None}


def test_the_rank_holds_what_the_data_says() -> None:
    parameters = 40_000_000
    assert defaults.ranks(2 * parameters, parameters, 16) == ()
    assert defaults.ranks(2 * parameters + 2, parameters, 16) == (32,)
    assert defaults.ranks(4 * parameters + 2, parameters, 16) == (64, 32)
    assert defaults.ranks(100 * parameters, parameters, 16) == (64, 32)


def test_a_rank_rises_with_the_data_where_that_costs_hardly_any_time() -> None:
    much = make_stats([1000 + index % 7 for index in range(60_000)])
    plan = planned(much, gpu="80GB", model="qwen2.5-0.5b")
    assert plan.setup.lora_r in (16, 32, 64)
    said = next(text for text in plan.assumptions if text.startswith("rank"))
    assert plan.setup.lora_r > 16 or "does not fit or is slower" in said
    assert planned(chat(), gpu="80GB").setup.lora_r == 16
    assert planned(much, gpu="80GB", model="qwen2.5-0.5b", lora_r=8).setup.lora_r == 8


def test_grouping_and_packing_together_are_refused() -> None:
    with pytest.raises(InputError, match="train_sampling_strategy"):
        make_request(MODEL, knobs={"packing": True, "train_sampling_strategy": "group_by_length"})


def test_flex_attention_is_not_tried_on_cards_that_torch_has_no_sizes_for() -> None:
    stats = chat(500)
    for gpu, with_flex in (("t4", False), ("rtx-4090", True)):
        assert any("flex" in one.strategy for one in tried(stats, gpu, "qwen2.5-0.5b")) == with_flex


def test_attention_is_kept_only_where_checkpoints_can_keep_it() -> None:
    """Flex attention is none of the kernels that selective checkpointing knows."""
    setups = [one.candidate.setup for one in searched(chat(), {}).tried]
    selective = {one.attn_implementation for one in setups if one.selective_checkpointing}
    assert selective
    assert "flex_attention" not in selective
    assert "flex_attention" in {one.attn_implementation for one in setups}


def test_the_longest_length_that_fits_is_taken_where_the_wished_one_does_not() -> None:
    """And the verdict says what it cuts."""
    stats = make_stats([600] * 500 + [24_000] * 500)
    plan = planned(stats, gpu="16GB", model="qwen2.5-14b")
    assert plan.fits
    assert 2048 < plan.setup.max_length < 24_000
    assert plan.setup.max_length not in defaults.DEFAULT_LENGTHS
    longer = planned(stats, gpu="16GB", model="qwen2.5-14b", max_length=plan.setup.max_length + 256)
    assert not longer.fits
    assert plan.data is not None
    assert plan.data.truncated_tokens > 0
