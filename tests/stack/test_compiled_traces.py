"""Compiled decoder layers against allocation traces of real training steps on an H100, and measured runs.

The traces are of small models (torch 2.11, inductor): nock without checkpointing, ck with, ck2 two of four
layers, sel selective, bNN with a budget of 0.NN, drop with dropout, l LoRA on 16 bits, f full fine-tuning.
"""

from __future__ import annotations

import pytest

from planner.base.data_files import PROFILES
from planner.calibration.records import RunRecord, read_records
from planner.memory import estimate_memory
from planner.memory.allocators.native import MIB
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import ALLOCATORS
from planner.setup.run import TrainingRun
from tests.each import for_each
from tests.stack.test_replayed_traces import step_of
from tests.stack.test_traces import TRACES, load, moments

NAMES = sorted(f"compiled/{path.name.removesuffix('.json.gz')}" for path in TRACES.glob("compiled/*.json.gz"))
WITH_TILES = [name for name in NAMES if not name.endswith(("_pad_ck", "_pack_ck"))]
"""Of padded and packed batches the head sees fewer rows than the trace's setup says."""

TOLERANCE = 0.0003
"""Vectors of a few bytes a token and 8-byte seeds are left out."""
LOOSE = {
    # 2 MiB: copies of fp32 adapter weights that autocast makes.
    "compiled/llama_l_ck": 0.003,
    # 1 MiB: OLMo 2's rotary tables are in fp32.
    "compiled/olmo2_ck": 0.004,
    "compiled/olmo2_nock": 0.001,
}
REPLAY_TOLERANCE = 0.004
"""Unsplit tails of cached blocks."""


def runs() -> list[RunRecord]:
    return [
        run
        for run in read_records(PROFILES / "runs" / "compiled-h100-80gb.jsonl")
        if run.setup.compile == "regional" and run.phase("step") is not None
    ]


def test_every_way_to_compile_has_a_trace() -> None:
    assert len(NAMES) == 38


@for_each(NAMES)
def test_peak_of_the_step(name: str) -> None:
    trace = load(name)
    tolerance = LOOSE.get(name, TOLERANCE)
    assert trace.peak_bytes == pytest.approx(max(trace.live), rel=tolerance), trace.step.name


@for_each(WITH_TILES)
def test_what_forward_holds_and_keeps(name: str) -> None:
    """The busiest moment of forward, and the head's first tile: there all that is kept lies beside it."""
    trace = load(name)
    tolerance = LOOSE.get(name, TOLERANCE)
    assert trace.span is not None
    tile = trace.span["forward"][0]
    assert moments(trace, prefix="forward of") == pytest.approx(max(trace.live[:tile]), rel=tolerance)
    measured = max(trace.live[tile : tile + 20])
    assert moments(trace, prefix="output head, forward") == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("allocator", ALLOCATORS)
@for_each(NAMES)
def test_a_replayed_step_comes_to_its_trace(name: str, allocator: str) -> None:
    step = step_of(name, allocator)
    assert step.peak_bytes == pytest.approx(step.traced_peak_bytes, rel=REPLAY_TOLERANCE, abs=MIB)
    # Kernels of one graph are reordered: a large block more or less is reserved.
    block = step.largest_block_bytes
    assert step.reserved_bytes == pytest.approx(step.traced_reserved_bytes, abs=block + 2 * MIB)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_most_steps_reserve_what_their_traces_do(allocator: str) -> None:
    """Where buffers of one graph take each other's places (planner/memory/decoder/buffer_reuse.py)."""
    others = [name for name in NAMES if step_of(name, allocator).reserved_error_bytes > 2 * MIB]
    assert len(others) <= 3, others


@for_each(runs, name=lambda run: f"{run.setup.model}-{run.id}")
def test_measured_runs(run: RunRecord) -> None:
    """Whole models of up to 48 layers."""
    step = run.phase("step")
    assert step is not None
    found, counted = (
        estimate_memory(
            TrainingRun(setup=run.setup, model=load_shipped(run.setup.model), padded=run.padded),
            replay=replay,
            allocator=run.allocator,
        )
        for replay in (True, False)
    )
    assert found.allocated_bytes == pytest.approx(step.allocated_bytes, rel=0.001)
    assert counted.allocated_bytes == pytest.approx(step.allocated_bytes, rel=0.001)
    assert found.reserved_bytes == pytest.approx(step.reserved_bytes, rel=0.018)
