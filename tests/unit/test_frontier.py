from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from planner.answers.plan import Alternative, FrontierPoint, Plan
from planner.base.data_files import PROFILES
from planner.cli import COMMANDS
from planner.commands.program import run_command
from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.planning.estimation import Estimator
from planner.planning.make_plan import make_plan
from planner.search import SPEED_TIE, TOKENS, Tried
from planner.search.evaluator import Evaluator
from planner.search.frontier import around_the_chosen, frontier, runners_up
from planner.setup.request import make_request

PAIRS = [
    ("qwen2.5-14b", "16GB"),
    ("llama-3.1-8b", "24GB"),
    ("smollm2-135m", "8GB"),
    ("qwen3-30b-a3b", "80GB"),
]
PLANS: dict[tuple[str, str], Plan] = {}


def plan_of(model: str, gpu: str) -> Plan:
    if (model, gpu) not in PLANS:
        PLANS[model, gpu] = make_plan(make_request(model, gpu=gpu))
    return PLANS[model, gpu]


def alternative(name: str, gib: float, *, gives_up: float | None) -> Alternative:
    """Another setup: one that fits and gives up a share of speed, or (None) one that is too large."""
    return Alternative(
        strategy=name,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        peak_upper_bytes=int(gib * 2**30),
        tokens_per_second=100.0,
        fits=gives_up is not None,
        lost="slower" if gives_up is not None else "too large",
        amount=1.0 if gives_up is None else gives_up,
    )


def point(name: str, gib: float, hours: float, *, chosen: bool = False) -> FrontierPoint:
    return FrontierPoint(
        strategy=name,
        setup=plan_of("qwen2.5-14b", "16GB").setup,
        peak_upper_bytes=int(gib * 2**30),
        tokens_per_second=100.0,
        hours=hours,
        fits=gib <= 16,
        chosen=chosen,
    )


@pytest.mark.parametrize(("model", "gpu"), PAIRS)
def test_more_memory_on_the_frontier_is_more_speed_and_the_plan_is_on_it(model: str, gpu: str) -> None:
    plan = plan_of(model, gpu)
    assert len(plan.frontier) > 1
    for smaller, larger in pairwise(plan.frontier):
        assert smaller.peak_upper_bytes <= larger.peak_upper_bytes
        if not larger.chosen:
            assert larger.hours * (1 + SPEED_TIE) < smaller.hours
    (chosen,) = [point for point in plan.frontier if point.chosen]
    assert chosen.setup == plan.setup
    assert chosen.peak_upper_bytes == plan.memory.peak_upper_bytes


@pytest.mark.parametrize(("model", "gpu"), PAIRS)
def test_nothing_that_was_tried_beats_a_point_of_the_frontier_in_both(model: str, gpu: str) -> None:
    plan = plan_of(model, gpu)
    for point in plan.frontier:
        better = [
            one
            for one in plan.alternatives
            if one.fits
            and one.peak_upper_bytes < point.peak_upper_bytes
            and (one.tokens_per_second or 0) > point.tokens_per_second * (1 + 2 * SPEED_TIE)
        ]
        assert better == []


def test_a_point_says_whether_it_fits_by_its_own_memory() -> None:
    plan = plan_of("qwen2.5-14b", "16GB")
    assert any(not point.fits for point in plan.frontier)
    for point in plan.frontier:
        assert point.fits == (point.peak_upper_bytes <= plan.gpu.usable_bytes)


def test_a_long_frontier_is_cut_around_the_chosen_point_and_keeps_the_smallest() -> None:
    points = tuple(
        FrontierPoint(
            strategy=str(index),
            setup=plan_of("qwen2.5-14b", "16GB").setup,
            peak_upper_bytes=index,
            tokens_per_second=float(index),
            hours=1 / index,
            fits=index <= 10,
            chosen=index == 10,
        )
        for index in range(1, 21)
    )
    assert [one.peak_upper_bytes for one in around_the_chosen(points)] == [1, 7, 8, 9, 10, 11, 12, 13]
    assert around_the_chosen(points[7:11]) == points[7:11]


def test_the_runner_up_comes_first_then_the_faster_ones_that_are_too_large() -> None:
    others = [alternative("slow", 10, gives_up=0.5), alternative("close", 14, gives_up=0.1)]
    others += [alternative("near", 17, gives_up=None), alternative("far", 40, gives_up=None)]
    points = [
        point("close", 14, 11),
        point("now", 15, 10, chosen=True),
        point("near", 17, 8),
        point("far", 40, 5),
    ]
    found = runners_up(others, points, 16 * 2**30)
    assert [one.strategy for one in found] == ["close", "near", "far"]
    assert [one.lacking_bytes / 2**30 for one in found] == [0, 1, 24]
    assert [one.faster for one in found] == pytest.approx([-0.1, 0.25, 1.0])


def test_without_a_faster_one_the_nearest_that_is_too_large_stands_for_them() -> None:
    others = [alternative("far", 40, gives_up=None), alternative("near", 17, gives_up=None)]
    (found,) = runners_up(others, [point("now", 15, 10, chosen=True)], 16 * 2**30)
    assert (found.strategy, found.faster, found.lacking_bytes) == ("near", 0.0, 2**30)


def test_with_data_time_counts_compilation_and_not_tokens_a_second_alone() -> None:
    plan = make_plan(make_request("llama-3.1-8b", gpu="24GB", data=str(PROFILES / "demo/data/train.jsonl")))
    assert plan.duration is not None
    (chosen,) = [one for one in plan.frontier if one.chosen]
    assert chosen.hours == pytest.approx(plan.duration.hours)
    assert chosen.hours == min(one.hours for one in plan.frontier if one.fits)
    for card in plan.other_cards:
        assert card.hours < plan.duration.hours


def test_plans_written_before_the_frontier_are_still_read() -> None:
    values = plan_of("qwen2.5-14b", "16GB").to_dict()
    assert Plan.from_dict(values) == plan_of("qwen2.5-14b", "16GB")
    del values["frontier"], values["other_cards"]
    old = Plan.from_dict(values)
    assert old.frontier == ()
    assert old.other_cards == ()


@pytest.mark.parametrize(("model", "gpu"), PAIRS)
def test_points_of_the_frontier_are_replayed_as_their_own_plans_are(model: str, gpu: str) -> None:
    """Seen the other way: points were told by the fitted estimate, up to 25 GiB off where they do not fit."""
    plan = plan_of(model, gpu)
    target = resolve_gpu(gpu)
    for point in plan.frontier:
        own = Estimator(target).estimate(point.setup)
        assert point.peak_upper_bytes == own.memory.peak_upper_bytes
        assert point.fits == own.fits


@pytest.mark.parametrize(("model", "gpu"), PAIRS)
def test_what_another_card_would_bring_is_what_a_plan_for_it_says(model: str, gpu: str) -> None:
    plan = plan_of(model, gpu)
    assert 1 <= len(plan.other_cards) <= 2
    for card in plan.other_cards:
        assert card.usable_bytes > plan.gpu.usable_bytes
        there = make_plan(make_request(model, gpu=card.gpu), whole=False)
        assert there.speed is not None
        assert there.duration is not None
        assert plan.duration is not None
        assert card.tokens_per_second == there.speed.tokens_per_second
        assert card.speedup == pytest.approx(plan.duration.hours / card.hours)
        assert card.hours == there.duration.hours
        assert card.usd_per_gpu_hour == there.duration.usd_per_gpu_hour


def test_the_longer_length_that_a_card_takes_fits_there_and_not_here() -> None:
    plan = plan_of("mistral-small-24b", "16GB")
    card = plan.other_cards[0]
    assert card.longer_length is not None
    assert card.longer_length > plan.setup.max_length
    longer = {"max_length": card.longer_length}
    assert not make_plan(make_request("mistral-small-24b", gpu="16GB", knobs=longer), whole=False).fits
    assert make_plan(make_request("mistral-small-24b", gpu=card.gpu, knobs=longer), whole=False).fits


def test_a_length_that_fits_here_with_offloading_is_not_named_of_another_card() -> None:
    plan = plan_of("qwen2.5-14b", "16GB")
    longer = {"max_length": 2 * plan.setup.max_length}
    there = make_plan(make_request("qwen2.5-14b", gpu="16GB", knobs=longer), whole=False)
    assert there.setup.activation_offloading
    assert [card.longer_length for card in plan.other_cards] == [None, None]


def test_where_nothing_fits_the_smallest_card_is_named_with_its_speed() -> None:
    plan = make_plan(make_request("llama-3.1-70b", gpu="24GB"))
    assert plan.smallest_gpu is not None
    named = {one.gpu: one.max_length for one in plan.smallest_cards}
    assert {card.gpu: card.setup.max_length for card in plan.other_cards} == named
    assert plan.smallest_gpu.gpu == plan.other_cards[0].gpu
    for card in plan.other_cards:
        assert card.speedup is None
        assert card.tokens_per_second > 0


def test_the_largest_card_knows_no_better_one() -> None:
    assert plan_of("llama-3.1-8b", "b200").other_cards == ()


def test_fixed_knobs_stay_as_asked_on_other_cards() -> None:
    knobs = {"per_device_train_batch_size": 2, "gradient_checkpointing": True, "compile": "none"}
    plan = make_plan(make_request("llama-3.1-8b", gpu="16GB", knobs=knobs))
    assert plan.other_cards
    for card in plan.other_cards:
        assert {name: getattr(card.setup, name) for name in knobs} == knobs
        assert card.setup.checkpointed_layers is None


def test_frontier_without_a_forecast_is_empty() -> None:
    plan = plan_of("qwen2.5-14b", "16GB")
    evaluator = Evaluator(resolve_model("qwen2.5-14b"), plan.gpu.spec, plan.gpu.usable_bytes)
    candidate = replace(evaluator.evaluate(plan.setup), speed=None)
    tried = Tried(strategy="as given", candidate=candidate, fits=True)
    assert frontier([tried], tried, evaluator, tokens=TOKENS) == ()


@pytest.mark.parametrize("width", [40, 60])
def test_no_figure_of_the_frontier_is_cut_in_a_narrow_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run_command("plan", COMMANDS["plan"], ["--model", "qwen2.5-14b", "--gpu", "16GB", "--full"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    plan = make_plan(make_request("qwen2.5-14b", gpu="16GB"))
    for point in plan.frontier:
        assert f"{point.peak_upper_bytes / 2**30:.2f} GiB" in text
        assert point.strategy in text
    assert "chosen" in text
