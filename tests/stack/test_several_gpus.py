"""What two ranks hold, counted: against what they really hold, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("bitsandbytes")

from planner.memory.held.optimizer import optimizer_memory
from planner.memory.held.sharded_weights import sharded_weights
from planner.memory.held.shards import absmax_bytes, held_trained, units_of
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.run import TrainingRun
from tests.stack import local_ranks
from tests.stack.sharing_ranks import CASES, measured_rank, setup_of
from tests.stack.small_models import spec_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return local_ranks.measured(measured_rank, tmp_path_factory.mktemp("ranks"), seconds=400)


def run_of(case: str, distributed: str) -> TrainingRun:
    return TrainingRun(setup=setup_of(case, distributed), model=spec_of(CASES[case][0]))


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_its_share(ranks: list[dict[str, Any]], case: str) -> None:
    run = run_of(case, "fsdp")
    weights, trained = (
        sharded_weights(run.kind, EXPANDABLE).memory,
        held_trained(run.trained, run.parallelism),
    )
    units = units_of(run)
    expected = {
        "quantized": weights.quantized_bytes,
        "unquantized": weights.unquantized_bytes,
        "adapter": 0 if case == "full" else trained.size_bytes,
        "gradients": units.reduced_bytes,
        "optimizer": optimizer_memory("adamw_torch", trained).allocated_bytes,
    }
    for rank in ranks:
        found = rank["sharded"][case]
        for name, size in expected.items():
            assert found[name] == pytest.approx(size, rel=0.02, abs=2048), name
    largest = max(units.layers, key=lambda unit: unit.flat_bytes)
    most = max(2 * largest.flat_bytes, 2 * units.embedding.flat_bytes, 2 * units.head.flat_bytes)
    assert ranks[0]["sharded"][case]["gathered"] == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("case", ["qlora", "qlora, constants in fp32, tied"])
def test_constants_are_shared_out_with_their_weights(ranks: list[dict[str, Any]], case: str) -> None:
    run = run_of(case, "fsdp")
    whole = sum(
        absmax_bytes(parameter.elements, run.storage) * parameter.count
        for parameter in run.model.parameters
        if run.storage.quantizes(parameter)
    )
    for rank in ranks:
        assert rank["sharded"][case]["absmax"] == pytest.approx(whole / local_ranks.RANKS, rel=0.02)


@pytest.mark.parametrize("case", ["qlora", "full"])
def test_gradients_lie_in_buckets_but_for_those_of_earlier_micro_steps(
    ranks: list[dict[str, Any]], case: str
) -> None:
    """Which are tensors of their own, as large, until the last micro-step copies them."""
    run = run_of(case, "ddp")
    for rank in ranks:
        found = rank["replicated"][case]
        assert found["buckets"] == pytest.approx(run.trained.size_bytes, rel=0.02)
        assert found["beside"] == pytest.approx(run.trained.size_bytes, rel=0.02)
