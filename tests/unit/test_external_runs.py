"""Forecasts beside runs that others published, none of which any rate was fitted to."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.external_runs import InexpressibleError, published_runs, rows, setup_of
from planner.calibration.accuracy import published_accuracy
from planner.calibration.published import PublishedRun, run_of
from planner.gpus.card_class import CARD_CLASSES, card_class
from planner.gpus.catalog import gpu_catalog
from planner.throughput.intervals import LEAST, published_interval
from planner.throughput.work import step_work


def of_class(name: str) -> list[PublishedRun]:
    return [run for run in published_runs()[0] if card_class(run.gpu) == name]


def test_every_run_names_its_source() -> None:
    assert len(rows()) == 117
    assert all(row["source_repo"] and row["source_path"] and row["source_commit"] for row in rows())
    assert all(row["n_gpu"] in (1, 2) and row["tokens_per_s"] > 0 for row in rows())


def test_no_run_is_dropped_without_a_reason() -> None:
    found, left_out = published_runs()
    assert len(found) + sum(left_out.values()) == len(rows())
    assert left_out == {
        "models outside the catalog": 22,
        "experts held in 4 bits, which transformers no longer does": 6,
        "optimizer steps inside the backward pass": 4,
        "torchao's 4-bit weights": 2,
    }


def test_forecasts_of_another_gpu_on_an_older_stack_are_right() -> None:
    errors = [run.error for run in published_runs()[0] if run.gpu.id == "a100-80gb"]
    assert len(errors) >= 50
    assert statistics.median(map(abs, errors)) < 0.07
    assert abs(statistics.fmean(errors)) < 0.06
    assert max(map(abs, errors)) < 0.15


@pytest.mark.parametrize(("name", "runs"), [("Turing", 12), ("Ampere", 60), ("Ada", 7)])
def test_forecasts_by_class_of_card_are_right_and_their_intervals_hold(name: str, runs: int) -> None:
    """Cards that nobody measured: no run is fitted, each is held out."""
    found = of_class(name)
    assert len(found) >= runs
    assert statistics.median(abs(run.error) for run in found) <= 0.2
    assert sum(run.covered for run in found) >= 0.9 * len(found)


@pytest.mark.parametrize("source", sorted({run.source for run in published_runs()[0]}))
def test_the_interval_that_every_class_has_covers_each_source_where_the_gpu_decides(source: str) -> None:
    """Learned without any source, it covers nine in ten of that one's runs; NeMo runs other kernels."""
    found = [run for run in published_runs()[0] if run.source == source and run.step.bound_by != "launches"]
    if not found or source == "NVIDIA-NeMo/Automodel":
        pytest.skip("no run here that the GPU decides, or another stack's kernels (docs/throughput.md)")
    inside = sum(LEAST[0] <= run.measured / run.forecast <= LEAST[1] for run in found)
    assert inside >= 0.8 * len(found)


def test_cards_that_few_runs_tell_of_have_wider_intervals() -> None:
    for gpu in gpu_catalog():
        low, high = published_interval(gpu, "compute")
        assert low <= LEAST[0]
        assert high >= LEAST[1]
        assert (low, high) == LEAST or card_class(gpu) != "Ampere"
        host_low, host_high = published_interval(gpu, "launches")
        assert host_low < low
        assert host_high > high


def test_accuracy_has_a_row_for_each_class_with_runs() -> None:
    found = published_accuracy()
    assert [one.card_class for one in found] == [name for name in CARD_CLASSES if of_class(name)]
    assert sum(one.summary.runs for one in found) == len(published_runs()[0])
    ampere = next(one for one in found if one.card_class == "Ampere")
    assert ampere.gpus == ("a100-40gb", "a100-80gb", "rtx-3090")
    assert ampere.sources == 4
    assert ampere.summary.worst == max((run.error for run in of_class("Ampere")), key=abs)


def test_a_run_is_forecast_as_its_source_describes_it() -> None:
    row = next(row for row in rows() if row["method"] == "qlora" and "Mistral-7B-v0.1" in row["model"])
    setup = setup_of(row)
    assert (setup.max_length, setup.lora_r, setup.lora_dropout) == (4096, 16, 0.1)
    assert setup.attn_implementation == "flash_attention_2"
    assert set(setup.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(InexpressibleError, match="4 bits"):
        setup_of(row | {"model": "mistralai/Mixtral-8x7B-Instruct-v0.1"})


def test_a_loop_without_a_trainer_computes_a_head_in_fp32_that_preparation_made_so() -> None:
    """In this stack's autocast it does not."""
    row = next(row for row in rows() if "plain loop" in row["framework"] and "kbit_prep" in row)
    plain = run_of(row)
    assert plain.setup.prepare_for_kbit_training
    assert plain.setup.dtype == "float16"
    theirs, ours = step_work(plain).forward, step_work(run_of(row | {"framework": "TRL"})).forward
    assert theirs["single_flop"] == ours["head_flop"] > 0
    assert theirs["head_flop"] == ours["single_flop"] == 0
