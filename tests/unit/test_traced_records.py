"""Traced models against runs on a GPU, of which no figure was fitted to any."""

from __future__ import annotations

import pytest

from planner.calibration.accuracy import traced_records
from planner.gpus.catalog import gpu_catalog
from planner.memory import estimate_memory
from planner.models.catalog import load_shipped
from planner.setup.run import TrainingRun
from planner.throughput.roofline import estimate_step


def test_traces_say_what_was_measured() -> None:
    """Allocated within 1% at each family's lengths; the driver's figure and speed in their intervals."""
    records = traced_records()
    lengths: dict[str, list[int]] = {}
    for record in records:
        gpu = gpu_catalog().get(record.environment.gpu_id or "")
        run = TrainingRun(setup=record.setup, model=load_shipped(record.setup.model))
        found, speed = estimate_memory(run, gpu=gpu, replay=True), estimate_step(run, gpu)
        step = next(phase for phase in record.phases if phase.name == "step")
        told = f"{record.setup.model} at {record.setup.max_length}"
        assert found.allocated_bytes == pytest.approx(step.allocated_bytes, rel=0.01), told
        assert found.reserved_bytes == pytest.approx(step.reserved_bytes, rel=0.01), told
        assert (step.process_bytes or 0) <= found.process_upper_bytes, told
        rate = record.tokens_per_second or 0
        assert speed.tokens_per_second_low <= rate <= speed.tokens_per_second_high, told
        lengths.setdefault(record.setup.model, []).append(record.setup.max_length)
    assert len(lengths) == 8
    assert sum(max(found) >= 2 * min(found) for found in lengths.values()) >= 7
