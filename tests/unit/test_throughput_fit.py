"""Rates fitted to runs: how many are needed, what is held out, where the fit starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from planner.calibration.accuracy import shipped_records
from planner.calibration.records import RunRecord
from planner.calibration.speed_fit import (
    MIN_RUNS,
    MIN_RUNS_FROM_START,
    REFERENCE_GPU,
    TooFewRunsError,
    fit_rates,
    forecast_errors,
    start_for,
    telling,
    told_kinds,
)
from planner.calibration.speed_problem import RatesProblem
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import load_shipped
from planner.setup.run import TrainingRun
from planner.throughput.rates import UNCALIBRATED, Rates, micro_step_time, rates_for
from planner.throughput.work import step_work

RUNS = [
    record
    for record in shipped_records()
    if record.environment.gpu_id == REFERENCE_GPU
    and record.outcome == "ok"
    and record.tokens_per_second is not None
    and record.fills_its_length
]


def test_packed_rows_count_as_full_ones_but_where_attention_skips_other_examples() -> None:
    """Their work is counted for whole rows; padded batches are of any length."""
    packed = next(
        one for one in RUNS if one.setup.packing and one.lengths and not one.setup.attn_implementation
    )
    rates = known(REFERENCE_GPU)

    def counted(record: RunRecord) -> bool:
        return bool(forecast_errors([record], rates, load_shipped))

    def changed(**knobs: object) -> RunRecord:
        return dataclasses.replace(packed, setup=packed.setup.replace(**knobs))

    assert counted(packed)
    assert not counted(changed(attn_implementation="flex_attention"))
    assert not counted(changed(packing=False))


def elsewhere(records: Sequence[RunRecord], *, slower: float = 1.0) -> list[RunRecord]:
    """The same runs, as if measured on an H200 and so many times slower."""
    return [
        dataclasses.replace(
            record,
            environment=dataclasses.replace(record.environment, gpu_id="h200"),
            tokens_per_second=(record.tokens_per_second or 0.0) / slower,
        )
        for record in records
    ]


def known(gpu: str) -> Rates:
    rates = rates_for(gpu_catalog().get(gpu))
    assert rates is not None
    return rates


def median(errors: Sequence[float]) -> float:
    return sorted(errors)[len(errors) // 2]


@pytest.mark.parametrize(("start", "needed"), [(None, MIN_RUNS), (known(REFERENCE_GPU), MIN_RUNS_FROM_START)])
def test_rates_need_runs_and_fewer_where_there_are_others_to_start_from(
    start: Rates | None, needed: int
) -> None:
    runs = elsewhere(RUNS[:needed])
    assert len(fit_rates(runs, "h200", load_shipped, start=start).rates.record_ids) == needed
    with pytest.raises(TooFewRunsError, match=f"{needed} are needed"):
        fit_rates(runs[1:], "h200", load_shipped, start=start)


def test_a_few_runs_move_all_that_they_use_and_leave_the_interval_wide() -> None:
    start = known(REFERENCE_GPU)
    runs = elsewhere(RUNS, slower=2.0)
    found = fit_rates(runs[:: len(runs) // 6], "h200", load_shipped, start=start).rates
    before = median([error.error for error in forecast_errors(runs, start, load_shipped)])
    after = median([error.error for error in forecast_errors(runs, found, load_shipped)])
    assert before > 0.8
    assert abs(after) < 0.2
    assert (found.low, found.high) == UNCALIBRATED


def test_a_rate_that_the_other_gpus_runs_hardly_tell_is_not_held_at_theirs() -> None:
    """Experts were measured twice on the reference, all else often."""
    start = known(REFERENCE_GPU)
    told = told_kinds(shipped_records(), start, load_shipped)
    assert "layer_flop" in told
    assert "expert_flop" not in told
    works = [
        (slow, step_work(slow.run(load_shipped(slow.setup.model))))
        for record in shipped_records()
        if record.environment.gpu_id == "h200" and record.tokens_per_second is not None
        for slow in elsewhere([record], slower=3.0)
        if load_shipped(record.setup.model).layers[0].experts
    ]

    def factor(held: frozenset[str]) -> float:
        problem = RatesProblem(works, start.seconds, 125.0, start.host_block_seconds, held)
        found = problem.rates(problem.solve(np.arange(len(works))))
        return found["expert_flop"] / start.seconds["expert_flop"]

    assert factor(told) > 1.5
    assert factor(told | {"expert_flop"}) == pytest.approx(1.0, abs=0.05)


def test_a_model_is_judged_by_what_others_told() -> None:
    """Whatever one model's own runs measured, its forecast stays the same."""
    model = RUNS[0].setup.model
    changed = [
        dataclasses.replace(run, tokens_per_second=(run.tokens_per_second or 0.0) * 3.0)
        if run.setup.model == model
        else run
        for run in RUNS
    ]

    def forecasts(runs: list[RunRecord]) -> list[float]:
        measured = {run.id: run.tokens_per_second or 0.0 for run in runs}
        residuals = fit_rates(runs, REFERENCE_GPU, load_shipped).residuals
        return [measured[one.record_id] * (1 + one.error) for one in residuals if one.model == model]

    assert forecasts(changed) == pytest.approx(forecasts(RUNS), rel=1e-9)


def test_one_model_alone_leaves_nothing_to_judge_by() -> None:
    model = max({run.setup.model for run in RUNS}, key=lambda m: sum(run.setup.model == m for run in RUNS))
    runs = [run for run in RUNS if run.setup.model == model]
    assert len(runs) >= MIN_RUNS
    found = fit_rates(runs, REFERENCE_GPU, load_shipped)
    assert found.residuals == ()
    assert (found.rates.low, found.rates.high) == UNCALIBRATED


def test_the_intervals_hold_nine_in_ten_runs_of_models_left_out() -> None:
    """Where the host decides the interval is wider: its speed differs from run to run."""
    found = fit_rates(RUNS, REFERENCE_GPU, load_shipped)
    inside = {True: [0, 0], False: [0, 0]}
    for one in telling(found.residuals):
        low, high = found.rates.interval("launches" if one.launches else "compute")
        count = inside[one.launches]
        count[0] += low <= 1 / (1 + one.error) <= high
        count[1] += 1
    for held, all_ in inside.values():
        assert all_ >= 20
        assert 0.85 <= held / all_ <= 0.95
    assert found.rates.launch_low < found.rates.low
    assert found.rates.launch_high > found.rates.high


def test_the_shipped_rates_are_what_the_records_give() -> None:
    """`python -m benchmarks.fit_rates` writes them."""
    for gpu in {record.environment.gpu_id for record in shipped_records()}:
        shipped = known(gpu)
        found = fit_rates(shipped_records(), gpu, load_shipped, start=start_for(gpu_catalog().get(gpu))).rates
        assert found.record_ids == shipped.record_ids
        assert found.seconds["layer_flop"] == pytest.approx(shipped.seconds["layer_flop"], rel=0.02)


def test_what_offloading_moves_is_what_layers_keep() -> None:
    run = next(run for run in RUNS if run.setup.activation_offloading)
    model = load_shipped(run.setup.model)
    kept = dataclasses.replace(run.setup, gradient_checkpointing=False)
    checkpointed = dataclasses.replace(run.setup, gradient_checkpointing=True)
    inputs = step_work(TrainingRun(setup=checkpointed, model=model)).offloaded_bytes
    assert inputs == model.num_hidden_layers * run.setup.tokens_per_micro_step * model.hidden_size * 2
    assert step_work(TrainingRun(setup=kept, model=model)).offloaded_bytes > 10 * inputs


def test_recomputing_is_the_backward_passs_work() -> None:
    setup = RUNS[0].setup
    model = load_shipped(setup.model)
    with_, without = (
        step_work(TrainingRun(setup=dataclasses.replace(setup, gradient_checkpointing=value), model=model))
        for value in (True, False)
    )
    assert with_.forward["layer_flop"] == without.forward["layer_flop"]
    assert with_.backward["layer_flop"] == without.backward["layer_flop"] + with_.forward["layer_flop"]
    assert with_.backward["launch"] > without.backward["launch"]


def test_runs_on_a_slow_host_do_not_make_the_rates_slow() -> None:
    """Half of a third of the runs on a host that takes twice as long for a block, and for all else."""
    true = known(REFERENCE_GPU)
    runs = []
    for index, run in enumerate(RUNS[::3]):
        work = step_work(TrainingRun(setup=run.setup, model=load_shipped(run.setup.model), padded=run.padded))
        slower = 2.0 if index % 2 else 1.0
        micro = micro_step_time(true, work, host_slower=slower).seconds
        accumulated = run.setup.gradient_accumulation_steps
        step = micro * accumulated + true.optimizer_seconds(work, host_slower=slower)
        tokens = run.setup.tokens_per_micro_step * accumulated
        timed = dataclasses.replace(
            run, tokens_per_second=tokens / step, host_block_seconds=1e-3 * slower, update_seconds=()
        )
        runs.append(timed)

    def percentile_90(records: Sequence[RunRecord]) -> float:
        residuals = fit_rates(records, REFERENCE_GPU, load_shipped).residuals
        return sorted(abs(one.error) for one in residuals)[int(0.9 * len(residuals))]

    assert percentile_90(runs) < 0.02
    assert percentile_90([dataclasses.replace(run, host_block_seconds=None) for run in runs]) > 0.15


def test_runs_of_an_earlier_trainer_count_less_once_there_are_some_of_todays() -> None:
    """Made up: today's runs as the shipped rates forecast them, of the others those that waited longer."""
    true = known(REFERENCE_GPU)

    def made(run: RunRecord, slower: float, block: float | None) -> RunRecord:
        work = step_work(TrainingRun(setup=run.setup, model=load_shipped(run.setup.model), padded=run.padded))
        accumulated = run.setup.gradient_accumulation_steps
        step = micro_step_time(true, work).seconds * accumulated + true.optimizer_seconds(work)
        tokens = run.setup.tokens_per_micro_step * accumulated
        return dataclasses.replace(run, tokens_per_second=tokens / step / slower, host_block_seconds=block)

    block = true.host_block_seconds
    today, earlier = RUNS[::3], [run for index, run in enumerate(RUNS) if index % 3]
    mixed = [made(run, 1.0, block) for run in today] + [made(run, 1.5, None) for run in earlier]
    found = fit_rates(mixed, REFERENCE_GPU, load_shipped)
    assert {one.record_id for one in telling(found.residuals)} <= {run.id for run in today}
    assert abs(median([one.error for one in telling(found.residuals)])) < 0.03
    alone = fit_rates([made(run, 1.5, None) for run in RUNS], REFERENCE_GPU, load_shipped)
    assert telling(alone.residuals) == alone.residuals
    assert abs(median([one.error for one in alone.residuals])) < 0.03
