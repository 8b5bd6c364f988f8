"""Measured runs say the same wherever they run, and the memory model says what they measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.measuring.profile import Profile
from planner.calibration.records import RunRecord
from planner.calibration.samples import own_process_bytes
from planner.gpus.detect import local_gpus
from planner.memory.measured.cuda_terms import tuning_buffer_bytes
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE, machine_allocator

from .measuring import measure, peak_bytes, profile

pytestmark = pytest.mark.gpu

ALLOCATED_ERROR, RESERVED_ERROR = 0.01, 0.05
CHECKPOINTED = profile(max_length=1024, per_device_train_batch_size=2)
SETUPS: dict[str, Profile] = {
    "eager attention": profile(per_device_train_batch_size=2, attn_implementation="eager"),
    "qlora checkpointed": CHECKPOINTED,
    "full": profile(method="full", optim="adamw_8bit"),
    "compiled": profile(max_length=1024, compile="regional", gradient_checkpointing=False),
    "packed": profile(
        max_length=1024, packing=True, attn_implementation="flex_attention", compile="regional"
    ),
    "qlora checkpointed again": CHECKPOINTED,
}
# The logits alone of so many tokens are larger.
TOO_LARGE = profile(max_length=4096, per_device_train_batch_size=2, memory_cap_bytes=2**30)
LENGTHS = tuple(40 + 37 * index % 470 for index in range(64))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, RunRecord]:
    """Records of all setups, measured one after the other in one process."""
    measured = measure(list(SETUPS.values()), tmp_path_factory.mktemp("shared"))
    assert (measured.code, len(measured.records)) == (0, len(SETUPS)), measured.errors
    return dict(zip(SETUPS, measured.records, strict=True))


def test_a_run_measures_the_same_in_a_shared_process_and_alone(
    shared: Mapping[str, RunRecord], tmp_path: Path
) -> None:
    alone = measure([CHECKPOINTED], tmp_path)
    assert alone.code == 0, alone.errors
    (record,) = alone.records
    assert record.isolated
    assert own_process_bytes(record) is not None
    assert record.weights_bytes == shared["qlora checkpointed"].weights_bytes
    for name in ("qlora checkpointed", "qlora checkpointed again"):
        assert not shared[name].isolated
        assert peak_bytes(shared[name]) == peak_bytes(record)


@pytest.mark.parametrize("name", list(SETUPS)[:-1])
def test_predicted_memory_is_what_is_measured(shared: Mapping[str, RunRecord], name: str) -> None:
    record = shared[name]
    assert record.outcome == "ok"
    assert record.predicted is not None
    allocated, reserved = peak_bytes(record)
    assert record.predicted.allocated_bytes == pytest.approx(allocated, rel=ALLOCATED_ERROR)
    # Kernels that an earlier run of the process has timed are not timed again, and take no buffer for it.
    known = tuning_buffer_bytes(local_gpus()[0].spec) if name == "packed" else 0
    expected = [record.predicted.reserved_bytes, record.predicted.reserved_bytes - known]
    assert any(reserved == pytest.approx(size, rel=RESERVED_ERROR) for size in expected)
    # None where earlier runs of the process left more with the driver than is this run's.
    process = own_process_bytes(record)
    if process is not None:
        assert process <= record.predicted.process_upper_bytes


def test_out_of_memory_is_an_outcome_and_the_next_run_is_clean_or_refused(
    shared: Mapping[str, RunRecord], tmp_path: Path
) -> None:
    measured = measure([TOO_LARGE, CHECKPOINTED], tmp_path)
    oom, *after = measured.records
    assert oom.outcome == "oom"
    assert oom.memory_cap_bytes == TOO_LARGE.memory_cap_bytes
    assert oom.phase("step") is None
    if after:
        assert measured.code == 0, measured.errors
        assert [peak_bytes(record) for record in after] == [peak_bytes(shared["qlora checkpointed"])]
    else:
        assert "NotCleanError" in measured.errors


def test_torchs_default_allocator_is_measured_where_a_profile_asks_for_it(
    shared: Mapping[str, RunRecord], tmp_path: Path
) -> None:
    measured = measure([replace(CHECKPOINTED, allocator=NATIVE)], tmp_path)
    assert measured.code == 0, measured.errors
    (record,) = measured.records
    machines = shared["qlora checkpointed"]
    assert (record.allocator, machines.allocator) == (NATIVE, machine_allocator())
    allocated, reserved = peak_bytes(record)
    # Expandable segments split off every rest.
    assert peak_bytes(machines)[0] <= allocated
    assert record.predicted is not None
    assert record.predicted.allocated_bytes == pytest.approx(allocated, rel=ALLOCATED_ERROR)
    assert record.predicted.reserved_bytes == pytest.approx(reserved, rel=RESERVED_ERROR)


def test_batches_of_many_lengths_and_of_one_share_a_process_and_another_allocator_ends_it(
    tmp_path: Path,
) -> None:
    setup = profile(per_device_train_batch_size=4, train_sampling_strategy="group_by_length").setup
    padded = Profile(setup=setup, steps=10, lengths=LENGTHS)
    assert padded.mixes_lengths
    other = NATIVE if machine_allocator() == EXPANDABLE else EXPANDABLE
    measured = measure([padded, CHECKPOINTED, replace(CHECKPOINTED, allocator=other)], tmp_path)
    record, full = measured.records
    assert [(one.outcome, one.allocator) for one in (record, full)] == [("ok", machine_allocator())] * 2
    assert len(record.step_seconds) == 12
    assert record.useful_tokens_per_second is not None
    assert record.tokens_per_second is not None
    assert 0 < record.useful_tokens_per_second <= record.tokens_per_second
    process = own_process_bytes(record)
    assert process is not None
    assert record.predicted is not None
    assert process <= record.predicted.process_upper_bytes
    # torch reads its setting once, so what asks for another is not measured in this process.
    assert measured.code != 0
    assert "NotCleanError" in measured.errors
