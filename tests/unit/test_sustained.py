"""What cards sustain of their published rates, and which of torch's kernels runs where."""

from __future__ import annotations

import pytest

from planner.gpus.catalog import gpu_catalog
from planner.gpus.spec import GpuSpec
from planner.gpus.sustained import (
    POWER_ANCHORS,
    reached_bandwidth_bytes_per_second,
    sustained_matrix_flops_per_second,
    sustained_single_flops_per_second,
)
from planner.models.catalog import load_shipped
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.torch_attention import TORCH_KERNELS, kernels_of, torch_kernel
from tests.each import for_each

CATALOG = gpu_catalog()


def sustained(gpu: str) -> float:
    found = sustained_matrix_flops_per_second(CATALOG.get(gpu))
    assert found is not None
    return found / 1e12


@for_each(CATALOG, name=lambda gpu: gpu.id)
def test_a_card_sustains_what_was_measured_or_no_more_than_is_published(gpu: GpuSpec) -> None:
    found, published = sustained_matrix_flops_per_second(gpu), gpu.matrix_flops_per_second
    if published is None:
        assert found is None
    elif gpu.measured_matrix_flops_per_second is not None:
        assert found == gpu.measured_matrix_flops_per_second
    else:
        assert found is not None
        assert 0.5 * published <= found <= published
    bandwidth = reached_bandwidth_bytes_per_second(gpu)
    if gpu.bandwidth_bytes_per_second is not None:
        assert bandwidth is not None
        assert 0.7 < bandwidth / gpu.bandwidth_bytes_per_second < 0.95


def test_power_holds_back_cards_whose_tensor_cores_run_at_full_rate() -> None:
    # Measured, and no anchor: a V100S, the same processors at 250 W, reached 88.9.
    assert sustained("v100-pcie-32gb") == pytest.approx(88.9, rel=0.02)
    # An A10 reached 35.3 in TF32, whose rate is half that of 16 bits.
    assert sustained("a10") == pytest.approx(70.7, rel=0.05)
    assert sustained("l40s") < 0.8 * 362
    assert sustained("l4") < 0.6 * 121
    # At half rate the clock holds: GeForce, and the L40 with the L40S's processors.
    for gpu in ("rtx-3060-12gb", "rtx-4070", "rtx-5080", "l40"):
        assert sustained(gpu) == pytest.approx((CATALOG.get(gpu).matrix_flops_per_second or 0.0) / 1e12)


def test_anchors_were_measured_at_a_known_power() -> None:
    for anchor in POWER_ANCHORS.values():
        card = CATALOG.get(anchor.gpu)
        assert card.measured_matrix_flops_per_second
        assert card.power_watts
        assert card.sm_count


def test_fp32_without_tf32_is_slower_than_published() -> None:
    for gpu in CATALOG:
        found = sustained_single_flops_per_second(gpu)
        assert (found is None) == (gpu.compute_capability >= (8, 0))
        assert found is None or 0.3 < found / (gpu.single_flops_per_second or 0.0) < 0.8


@pytest.mark.parametrize(
    ("capability", "asked", "kernel"),
    [
        ((9, 0), {}, "cudnn"),
        ((9, 0), {"masked": True}, "cudnn"),
        ((9, 0), {"head_dim": 256}, "flash"),
        ((10, 0), {}, "cudnn"),
        ((8, 0), {}, "flash"),
        ((8, 9), {"shared": True}, "flash"),
        ((12, 0), {}, "flash"),
        ((8, 6), {"masked": True}, "memory_efficient"),
        ((8, 6), {"dtype": "float32"}, "memory_efficient"),
        ((8, 6), {"dtype": "float32", "shared": True}, "math"),
        ((7, 5), {"dtype": "float16"}, "memory_efficient"),
        ((7, 5), {"dtype": "float16", "masked": True}, "memory_efficient"),
        ((7, 5), {"dtype": "float16", "shared": True}, "math"),
        ((7, 5), {"dtype": "bfloat16"}, "math"),
    ],
)
def test_torch_takes_the_first_kernel_that_can(
    capability: tuple[int, int], asked: dict[str, object], kernel: str
) -> None:
    usual = {"head_dim": 128, "masked": False, "shared": False, "dtype": "bfloat16"}
    assert torch_kernel(capability, **(usual | asked)).name == kernel  # type: ignore[arg-type]


def test_every_kernel_says_where_it_stands() -> None:
    assert all(kernel.source.startswith("sdp_utils.cpp: ") for kernel in TORCH_KERNELS)


@pytest.mark.parametrize(
    ("model", "knobs", "capability", "kernels"),
    [
        ("llama-3.2-1b", {}, (8, 9), ["flash"]),
        ("llama-3.2-1b", {"packing": True}, (8, 9), ["memory_efficient"]),
        ("gemma-3-4b", {"max_length": 4096}, (8, 9), ["memory_efficient", "flash"]),
        ("gemma-3-4b", {"max_length": 4096}, (9, 0), ["memory_efficient", "flash"]),
        ("llama-3.2-1b", {"attn_implementation": "eager"}, (8, 9), []),
    ],
)
def test_a_runs_kernels_follow_its_layers(
    model: str, knobs: dict[str, object], capability: tuple[int, int], kernels: list[str]
) -> None:
    setup = TrainingSetup.from_dict({"model": model, "max_length": 1024} | knobs)
    run = TrainingRun(setup=setup, model=load_shipped(model))
    assert sorted(kernel.name for kernel in kernels_of(run, capability)) == sorted(kernels)
