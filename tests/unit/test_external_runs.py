"""Forecasts beside runs that others published, none of which any rate was fitted to."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.external_runs import InexpressibleError, forecasts, rows, setup_of


def test_every_run_names_its_source() -> None:
    assert len(rows()) == 90
    assert all(row["source_repo"] and row["source_path"] and row["source_commit"] for row in rows())
    assert all(row["n_gpu"] == 1 and row["tokens_per_s"] > 0 for row in rows())


def test_no_run_is_dropped_without_a_reason() -> None:
    found, left_out = forecasts()
    assert len(found) + sum(left_out.values()) == len(rows())
    assert left_out == {
        "models outside the catalog": 22,
        "experts held in 4 bits, which transformers no longer does": 6,
        "optimizer steps inside the backward pass": 4,
        "torchao's 4-bit weights": 2,
    }


def test_forecasts_of_another_gpu_on_an_older_stack_are_right() -> None:
    errors = [run.error for run in forecasts()[0] if run.gpu == "a100-80gb"]
    assert len(errors) >= 50
    assert statistics.median(map(abs, errors)) < 0.07
    assert abs(statistics.fmean(errors)) < 0.06
    assert max(map(abs, errors)) < 0.15


def test_a_run_is_forecast_as_its_source_describes_it() -> None:
    row = next(row for row in rows() if row["method"] == "qlora" and "Mistral-7B" in row["model"])
    setup = setup_of(row)
    assert (setup.max_length, setup.lora_r, setup.lora_dropout) == (4096, 16, 0.1)
    assert setup.attn_implementation == "flash_attention_2"
    assert set(setup.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(InexpressibleError, match="4 bits"):
        setup_of(row | {"model": "mistralai/Mixtral-8x7B-Instruct-v0.1"})
