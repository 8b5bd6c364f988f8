"""Microbenchmarks take less than a minute, and no figure is beyond what the card can do."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from planner.gpus.detect import local_gpus
from planner.throughput.microbenchmarks import Microbenchmarks, read_microbenchmarks

pytestmark = pytest.mark.gpu

SECONDS = 60
# Cards boost beyond the clock of their published figures.
ABOVE_PUBLISHED = 1.1
LEAST_SHARE = 0.25


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Microbenchmarks, float]:
    """The figures, and the seconds that they took."""
    output = tmp_path_factory.mktemp("microbenchmarks") / "measured.json"
    started = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-m", "launcher.measuring.microbench", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=3 * SECONDS,
    )
    taken = time.monotonic() - started
    assert child.returncode == 0, child.stderr[-3000:]
    return read_microbenchmarks(output), taken


def test_they_take_less_than_a_minute(measured: tuple[Microbenchmarks, float]) -> None:
    assert measured[1] < SECONDS


def test_rates_of_products_and_attention_are_below_the_published_one(
    measured: tuple[Microbenchmarks, float],
) -> None:
    found, published = measured[0], local_gpus()[0].spec.matrix_flops_per_second
    assert found.matrix
    assert found.adapter
    assert found.attention
    assert found.dtype == "bfloat16"
    if published is None:
        pytest.skip(f"no matrix rate of {found.gpu_name} is published in the catalog")
    for products in (*found.matrix, *found.adapter):
        assert products.flops_per_second <= ABOVE_PUBLISHED * published, products
    for attention in found.attention:
        assert attention.flops_per_second <= ABOVE_PUBLISHED * published, attention
    assert found.peak_matrix_flops_per_second is not None
    assert found.peak_matrix_flops_per_second >= LEAST_SHARE * published
    # Without tensor cores: GeForce cards reach half of their rate with them.
    assert found.single_flops_per_second is not None
    assert found.single_flops_per_second <= ABOVE_PUBLISHED * published
    assert found.tf32_flops_per_second is not None
    assert found.tf32_flops_per_second <= ABOVE_PUBLISHED * published


def test_memory_is_no_faster_than_its_bus(measured: tuple[Microbenchmarks, float]) -> None:
    found, published = measured[0], local_gpus()[0].spec.bandwidth_bytes_per_second
    if published is None:
        pytest.skip(f"the bandwidth of {found.gpu_name} is unknown")
    for rate in (found.copy_bytes_per_second, found.elementwise_bytes_per_second):
        assert LEAST_SHARE * published <= rate <= ABOVE_PUBLISHED * published
    for slower in (found.dequantized_bytes_per_second, found.host_copy_bytes_per_second):
        assert slower is not None
        assert slower <= ABOVE_PUBLISHED * published


def test_a_launch_is_shorter_than_what_is_made_of_many(measured: tuple[Microbenchmarks, float]) -> None:
    found = measured[0]
    assert found.quantized_call_seconds is not None
    assert 1e-7 < found.kernel_launch_seconds < found.quantized_call_seconds < 0.1
    assert found.kernel_launch_seconds < found.eager_block_seconds < 0.1
