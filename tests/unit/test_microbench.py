"""Microbenchmarks: what they measure, how two GPUs compare, and what a forecast makes of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from planner.base.errors import InputError
from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.models.catalog import load_shipped
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput import NoForecastError, estimate_step
from planner.throughput.microbenchmarks import (
    AttentionRate,
    MatrixRate,
    Microbenchmarks,
    forget_microbenchmarks,
    own_file,
    read_microbenchmarks,
    slowdown,
)
from planner.throughput.rates import known_rates, rates_for
from planner.throughput.roofline import borrowed_rates, rates_of

UNLISTED = GpuSpec(
    id="rtx9999",
    name="NVIDIA RTX 9999",
    memory_bytes=24 * 2**30,
    usable_bytes=23 * 2**30,
    compute_capability=(12, 0),
    supports_bfloat16=True,
    bandwidth_bytes_per_second=None,
    matrix_flops_per_second=None,
)
SMALL = TrainingSetup(model="qwen2.5-0.5b", max_length=1024)
LARGE = TrainingSetup(model="llama-3.1-8b", max_length=2048, per_device_train_batch_size=8)


def matrix(rate: float, tokens: int = 2048) -> MatrixRate:
    return MatrixRate(tokens=tokens, inputs=4096, outputs=14336, flops_per_second=rate)


def kernels(gpu: str, *, speed: float = 1.0, host: float = 1.0) -> Microbenchmarks:
    return Microbenchmarks(
        gpu=gpu,
        gpu_name=gpu,
        created="2026-11-22T00:00:00+00:00",
        dtype="bfloat16",
        versions=(("torch", "2.11.0"),),
        matrix=(matrix(6e14 * speed), matrix(5e14 * speed, tokens=512)),
        adapter=(matrix(3e13 * speed),),
        attention=(AttentionRate(head_dim=128, length=4096, flops_per_second=4e14 * speed),),
        single_flops_per_second=5e13 * speed,
        tf32_flops_per_second=3e14 * speed,
        copy_bytes_per_second=2.8e12 * speed,
        elementwise_bytes_per_second=2.7e12 * speed,
        dequantized_bytes_per_second=1.5e12 * speed,
        host_copy_bytes_per_second=4e10,
        kernel_launch_seconds=4e-6 * host,
        eager_block_seconds=1e-3 * host,
        quantized_call_seconds=4e-4 * host,
    )


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path))
    forget_microbenchmarks()
    for cached in (rates_of, known_rates):
        cached.cache_clear()
    yield
    forget_microbenchmarks()
    for cached in (rates_of, known_rates):
        cached.cache_clear()


def keep(found: Microbenchmarks) -> None:
    path = own_file(found.gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found.to_dict()))
    forget_microbenchmarks()
    rates_of.cache_clear()


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Microbenchmarks]:
    for package in ("torch", "bitsandbytes", "peft"):
        pytest.importorskip(package)
    path = tmp_path_factory.mktemp("microbench") / "cpu.json"
    command = [
        sys.executable,
        "-m",
        "launcher.measuring.microbench",
        "--device",
        "cpu",
        "--output",
        str(path),
        "--seconds=400",  # a loaded machine measures all of it too
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    return done.stdout.splitlines(), read_microbenchmarks(path)


@pytest.mark.slow
def test_the_same_code_measures_a_processor(on_cpu: tuple[list[str], Microbenchmarks]) -> None:
    lines, found = on_cpu
    assert found.gpu == "cpu"
    assert all(rate.flops_per_second > 1e6 for rate in (*found.matrix, *found.adapter, *found.attention))
    assert len(found.matrix) == 2
    assert len(found.attention) == 2
    assert found.dequantized_bytes_per_second
    # A tiny kernel takes less of the host than norms with their backward pass.
    assert found.kernel_launch_seconds < found.eager_block_seconds
    assert found.host_copy_bytes_per_second is None
    assert dict(found.versions).keys() >= {"torch", "bitsandbytes"}
    assert len([line for line in lines if "microbenchmark" in line]) >= 4


@pytest.mark.slow
def test_what_does_not_fit_the_free_memory_or_the_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    from launcher.measuring.microbench import Bench

    bench = Bench("cpu", seconds=0.0)
    assert (list(bench._matrix()), list(bench._adapter()), list(bench._attention())) == ([], [], [])
    bench = Bench("cpu")
    monkeypatch.setattr(Bench, "_has_room", lambda self, needed_bytes: needed_bytes < 2**14)
    assert len(list(bench._matrix())) < len(bench.sizes.shapes)


@pytest.mark.slow
def test_the_layer_that_is_timed_is_the_one_that_is_trained() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    from launcher.measuring.microbench import Bench

    layer = Bench("cpu")._quantized_layer()[0]
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    assert layer.get_base_layer().weight.dtype.itemsize == 1


def test_microbenchmarks_survive_their_json() -> None:
    found = kernels("h200")
    assert Microbenchmarks.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    "wrong",
    [{"copy_bytes_per_second": 0.0}, {"kernel_launch_seconds": -1.0}, {"schema_version": 2}, {"x": 1}],
)
def test_impossible_figures_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Microbenchmarks.from_dict(kernels("h200").to_dict() | wrong)


def test_gpus_are_compared_over_shapes_that_both_have() -> None:
    reference = kernels("a")
    faster = dataclasses.replace(kernels("b", speed=2.0, host=3.0), matrix=(matrix(12e14), matrix(1.0, 99)))
    found = slowdown(faster, reference)
    assert found.matrix == pytest.approx(0.5)
    assert found.elementwise == pytest.approx(0.5)
    assert found.launch == pytest.approx(3.0)
    nothing = dataclasses.replace(faster, matrix=(), dequantized_bytes_per_second=None)
    assert (slowdown(nothing, reference).matrix, slowdown(nothing, reference).dequantized) == (None, None)


def rate(setup: TrainingSetup, gpu: GpuSpec) -> float:
    return estimate_step(TrainingRun(setup=setup, model=load_shipped(setup.model)), gpu).tokens_per_second


def test_measured_ratios_replace_published_ones() -> None:
    card = gpu_catalog().get("rtx-4090")
    published = estimate_step(TrainingRun(setup=LARGE, model=load_shipped(LARGE.model)), card)
    keep(kernels("h100-80gb"))
    # Microbenchmarks of one GPU alone compare with nothing.
    assert rate(LARGE, card) == published.tokens_per_second
    keep(kernels("rtx-4090", speed=0.1))
    measured = estimate_step(TrainingRun(setup=LARGE, model=load_shipped(LARGE.model)), card)
    h100 = rate(LARGE, gpu_catalog().get("h100-80gb"))
    assert measured.tokens_per_second == pytest.approx(0.1 * h100, rel=0.05)
    assert "scaled by microbenchmarks" in measured.basis
    assert "published" in published.basis
    assert not measured.calibrated


def test_a_slow_host_slows_what_waits_for_it() -> None:
    card = gpu_catalog().get("a100-80gb")
    keep(kernels("h100-80gb"))
    keep(kernels("a100-80gb"))
    before = [rate(setup, card) for setup in (SMALL, LARGE)]
    keep(kernels("a100-80gb", host=2.0))
    after = [rate(setup, card) for setup in (SMALL, LARGE)]
    assert after[0] < 0.6 * before[0]
    assert after[1] > 0.8 * before[1]


def test_a_card_outside_the_catalog_is_forecast_once_measured() -> None:
    with pytest.raises(NoForecastError, match="unknown"):
        rate(LARGE, UNLISTED)
    keep(kernels("h100-80gb"))
    keep(kernels(UNLISTED.id, speed=0.3))
    found = estimate_step(TrainingRun(setup=LARGE, model=load_shipped(LARGE.model)), UNLISTED)
    assert 0 < found.tokens_per_second <= found.roofline_tokens_per_second


def test_a_gpus_own_runs_come_before_anything_borrowed() -> None:
    card = gpu_catalog().get("h100-80gb")
    keep(kernels("h100-80gb", speed=0.01))
    assert rates_of(card).source == "runs"
    assert borrowed_rates(card).reference == "h200"


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = own_file("h200")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(InputError, match=r"h200\.json"):
        rate(LARGE, gpu_catalog().get("h200"))


def test_the_host_that_was_measured_here_is_the_one_of_the_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of a GPU's runs hold for the host that they were measured on."""
    card = gpu_catalog().get("h100-80gb")
    own = rates_for(card)
    assert own is not None
    known = dataclasses.replace(own, host_block_seconds=1e-3)
    monkeypatch.setattr("planner.throughput.roofline.rates_for", lambda gpu: known)
    before = [rate(setup, card) for setup in (SMALL, LARGE)]
    keep(kernels("h100-80gb"))
    assert [rate(setup, card) for setup in (SMALL, LARGE)] == before
    keep(kernels("h100-80gb", host=2.0))
    after = [rate(setup, card) for setup in (SMALL, LARGE)]
    assert after[0] < 0.6 * before[0]
    assert after[1] > 0.8 * before[1]
