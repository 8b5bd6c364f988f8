"""Which runs' driver figures are their own: what earlier runs in a process leave shows in later ones."""

from __future__ import annotations

import dataclasses

from planner.calibration.accuracy import shipped_records
from planner.calibration.records import RunRecord
from planner.calibration.samples import (
    LEFT_OVER_BYTES,
    LOADED_BYTES,
    clean_context_bytes,
    own_process_bytes,
    samples_of,
)
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import EXPANDABLE

MIB = 2**20
H100 = gpu_catalog().get("h100-80gb")


def after_loading(record: RunRecord, process_bytes: int) -> RunRecord:
    """The same run with another figure of the driver after loading."""
    load = record.phase("load")
    assert load is not None
    other = dataclasses.replace(load, process_bytes=process_bytes)
    return dataclasses.replace(record, phases=tuple(other if one is load else one for one in record.phases))


def test_only_a_runs_own_driver_figure_counts() -> None:
    """What earlier runs in the process left shows in its context, or after loading."""
    clean = clean_context_bytes(shipped_records(), H100.id)
    records = [sample.record for sample in samples_of(shipped_records(), H100, load_shipped)]
    later = [record for record in records if record.allocator == EXPANDABLE and not record.isolated]
    found = [record for record in later if own_process_bytes(record, clean) is not None]
    assert len(found) >= 35
    record = found[0]
    step, load = record.phase("step"), record.phase("load")
    assert step is not None
    assert load is not None
    assert load.process_bytes is not None
    assert own_process_bytes(record, clean) == step.process_bytes
    more = load.reserved_bytes + record.context_bytes + LEFT_OVER_BYTES
    assert own_process_bytes(after_loading(record, more), clean) == step.process_bytes
    assert own_process_bytes(after_loading(record, more + 1), clean) is None
    dirty = clean + LOADED_BYTES + 1
    same_left = after_loading(
        dataclasses.replace(record, context_bytes=dirty),
        load.process_bytes + dirty - record.context_bytes,
    )
    assert own_process_bytes(same_left, clean) is None
    # The first run in a process has it to itself, whatever the context.
    assert own_process_bytes(dataclasses.replace(same_left, isolated=True), clean) == step.process_bytes


def first_run(optim: str, beyond_mib: int, *, isolated: bool = True) -> RunRecord:
    """A run at whose end the driver shows so much beyond reserved memory."""
    record = next(record for record in shipped_records() if record.phase("step") is not None)
    step = record.phase("step")
    assert step is not None
    shown = dataclasses.replace(step, process_bytes=step.reserved_bytes + beyond_mib * MIB)
    return dataclasses.replace(
        record, phases=(shown,), isolated=isolated, setup=record.setup.replace(optim=optim)
    )


def test_a_clean_context_is_the_usual_one_of_first_runs_without_managed_memory() -> None:
    """Not the least: with flex attention one lacks the kernels that all others load."""
    records = [
        first_run("adamw_torch", 780),
        first_run("adamw_8bit", 760),
        first_run("adamw_torch_fused", 740),
        first_run("adamw_torch", 500, isolated=False),
        first_run("paged_adamw_8bit", 400),
    ]
    assert clean_context_bytes(records, records[0].environment.gpu_id) == 760 * MIB
    assert clean_context_bytes(records, "l4") == 0
