"""Run records, and the calibration that is fitted to them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from planner.base.data_files import PROFILES
from planner.base.errors import FieldError, InputError
from planner.base.units import MIB
from planner.calibration.accuracy import shipped_records
from planner.calibration.memory_fit import MARGIN_BYTES, REPLAY_MARGIN_BYTES, calibrate, held_out_residuals
from planner.calibration.records import (
    MeasuredPhase,
    RunRecord,
    all_records,
    append_record,
    read_records,
)
from planner.calibration.samples import clean_context_bytes, own_process_bytes, samples_of
from planner.gpus.catalog import gpu_catalog
from planner.memory import estimate_memory
from planner.memory.measured.coefficients import (
    UNKNOWN_REPLAY_MARGIN_BYTES,
    Coefficients,
    KindShares,
    ReserveTerms,
    cublas_workspace_bytes,
)
from planner.memory.measured.cuda_terms import managed_process_bytes
from planner.memory.measured.files import coefficients_for, coefficients_name
from planner.memory.step.replay import replay_steps
from planner.memory.step.replayed import ReplayedMemory
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import ALLOCATORS, EXPANDABLE, NATIVE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

H100 = gpu_catalog().get("h100-80gb")
SHIPPED = PROFILES / "runs" / "h100-80gb.jsonl"
MODELS = ("llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-3-1b", "smollm2-135m")
KNOWN = Coefficients(
    name="known",
    context_bytes=700 * MIB,
    workspace_bytes=64 * MIB,
    reserve_constant_bytes=20 * MIB,
    reserve_per_byte=(0.3, 0.2, 0.05, 0.4, 0.1),
    margin_fraction=0.0,
    margin_bytes=0,
    record_ids=(),
    model_ids=(),
    gpu="h100-80gb",
    stack_versions=(),
)


def shipped() -> tuple[RunRecord, ...]:
    return tuple(read_records(SHIPPED))


def usable(allocator: str) -> list[RunRecord]:
    samples = samples_of(shipped_records(), H100, load_shipped)
    return [sample.record for sample in samples if sample.record.allocator == allocator]


def synthetic(number: int, setup: TrainingSetup, **changes: Any) -> RunRecord:
    """A record that is exactly what KNOWN says."""
    model, allocator = load_shipped(setup.model), changes.get("allocator", NATIVE)
    found = estimate_memory(
        TrainingRun(setup=setup, model=model), gpu=H100, coefficients=KNOWN, allocator=allocator
    )
    step = MeasuredPhase(
        name="step",
        allocated_bytes=found.allocated_bytes,
        reserved_bytes=found.reserved_bytes,
        process_bytes=found.process_bytes,
    )
    values = {
        "id": f"synthetic-{number}",
        "setup": setup,
        "phases": (step,),
        "predicted": None,
        "isolated": True,
        "memory_cap_bytes": None,
        "padded": False,
        "outcome": "ok",
    }
    return dataclasses.replace(shipped()[0], **{**values, **changes})


def synthetic_records(allocator: str = NATIVE) -> list[RunRecord]:
    records: list[RunRecord] = []
    for model in MODELS:
        for length, batch in ((512, 2), (2048, 1), (1024, 8), (4096, 2)):
            setup = TrainingSetup(model=model, max_length=length, per_device_train_batch_size=batch)
            for knobs in ({}, {"gradient_checkpointing": False}, {"optim": "adamw_torch", "method": "full"}):
                records.append(synthetic(len(records), setup.replace(**knobs), allocator=allocator))
    return records


def test_json_round_trip() -> None:
    for record in shipped():
        again = RunRecord.from_dict(json.loads(json.dumps(record.to_dict())))
        assert again == record
        assert again.phase("step") == record.phase("step")
        assert again.phase("nothing") is None


def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "own.jsonl"
    for record in shipped()[:2]:
        append_record(path, record)
    with path.open("a") as file:
        file.write("\n" + json.dumps(shipped()[2].to_dict())[:100])
    assert tuple(read_records(path)) == shipped()[:2]


@pytest.mark.parametrize("broken", ["{", "[]", "null", '{"id": 1}', "\udcff"])
def test_a_broken_line_names_file_and_line(broken: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    append_record(path, shipped()[0])
    with path.open("a", errors="surrogateescape") as file:
        file.write(broken + "\n")
    with pytest.raises(InputError, match=r"own\.jsonl"):
        list(read_records(path))
    if broken != "\udcff":
        with pytest.raises(InputError, match="line 2"):
            list(read_records(path))


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        list(read_records(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "fine"},
        {"source": "guessed"},
        {"schema_version": 2},
        {"id": ""},
    ],
)
def test_a_record_is_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(FieldError):
        dataclasses.replace(shipped()[0], **changes)


def test_own_records_join_the_shipped_ones_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path))
    before = all_records()
    append_record(tmp_path / "runs" / "own.jsonl", before[0])
    append_record(tmp_path / "runs" / "own.jsonl", dataclasses.replace(before[0], id="mine"))
    assert {record.id for record in all_records()} == {record.id for record in before} | {"mine"}
    assert len(all_records()) == len(before) + 1


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_known_coefficients_are_recovered(allocator: str) -> None:
    records = synthetic_records(allocator)
    found = calibrate(records, H100, load_shipped, name="again", allocator=allocator)
    fitted = found.coefficients
    assert fitted.allocator == allocator
    assert fitted.context_bytes == pytest.approx(KNOWN.context_bytes, abs=MIB)
    assert fitted.reserve_per_byte == pytest.approx(KNOWN.reserve_per_byte, abs=0.01)
    assert fitted.reserve_constant_bytes == pytest.approx(KNOWN.reserve_constant_bytes, abs=2 * MIB)
    assert fitted.gpu == "h100-80gb"
    assert max(abs(residual.allocated_error) for residual in found.fitted_residuals) < 0.002
    assert max(abs(residual.reserved_error) for residual in found.fitted_residuals) < 0.01


def test_an_allocators_reserve_rests_on_its_own_runs() -> None:
    """Runs with the other tell of the context, and of what was measured at all."""
    doubled = dataclasses.replace(KNOWN, reserve_per_byte=tuple(2 * rate for rate in KNOWN.reserve_per_byte))
    records = synthetic_records(NATIVE)
    for record in synthetic_records(EXPANDABLE):
        model = load_shipped(record.setup.model)
        found = estimate_memory(
            TrainingRun(setup=record.setup, model=model),
            gpu=H100,
            coefficients=doubled,
            allocator=record.allocator,
        )
        step = MeasuredPhase(
            name="step",
            allocated_bytes=found.allocated_bytes,
            reserved_bytes=found.reserved_bytes,
            process_bytes=found.process_bytes,
        )
        records.append(dataclasses.replace(record, id=f"{record.id}-expandable", phases=(step,)))
    for allocator, known in ((NATIVE, KNOWN), (EXPANDABLE, doubled)):
        fit = calibrate(records, H100, load_shipped, name="again", allocator=allocator)
        assert fit.coefficients.reserve_per_byte == pytest.approx(known.reserve_per_byte, abs=0.01)
        assert fit.coefficients.context_bytes == pytest.approx(KNOWN.context_bytes, abs=MIB)
        assert len(fit.coefficients.record_ids) == len(records)
        assert len(fit.residuals) == len(records) // 2


@pytest.mark.parametrize(("allocator", "runs", "driver"), [(EXPANDABLE, 120, 40), (NATIVE, 150, 20)])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.slow
def test_the_interval_covers_every_held_out_record(
    replay: bool, allocator: str, runs: int, driver: int
) -> None:
    """By the driver's figure where it is the run's own, else by reserved memory."""
    found = calibrate(shipped_records(), H100, load_shipped, name="again", allocator=allocator)
    clean = clean_context_bytes(shipped_records(), H100.id)
    records = usable(allocator)
    assert len(records) >= runs
    assert sum(own_process_bytes(record, clean) is not None for record in records) >= driver
    for record in records:
        step = record.phase("step")
        assert step is not None
        predicted = estimate_memory(
            TrainingRun(setup=record.setup, model=load_shipped(record.setup.model), padded=record.padded),
            gpu=H100,
            coefficients=found.coefficients,
            replay=replay,
            allocator=allocator,
        )
        beyond = predicted.process_bytes - predicted.reserved_bytes
        assert step.reserved_bytes + beyond <= predicted.process_upper_bytes, record.id
        assert (own_process_bytes(record, clean) or 0) <= predicted.process_upper_bytes, record.id
        assert predicted.basis.measured, predicted.basis.notes
    assert found.coefficients.margin_bytes == MARGIN_BYTES
    assert found.coefficients.replay_margin_bytes == REPLAY_MARGIN_BYTES
    assert found.coefficients.outside_factor > 1


@pytest.mark.slow
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_the_shipped_calibration_is_that_of_the_shipped_records(allocator: str) -> None:
    fit = calibrate(shipped_records(), H100, load_shipped, name=H100.id, allocator=allocator)
    fitted = fit.coefficients
    file = PROFILES / "calibration" / coefficients_name(H100.id, allocator)
    shipped_file = json.loads(file.read_text())
    again = json.loads(json.dumps(fitted.to_dict()))
    assert {k: v for k, v in again.items() if k not in ("reserve_per_byte", "kinds", "outside_factor")} == {
        k: v for k, v in shipped_file.items() if k not in ("reserve_per_byte", "kinds", "outside_factor")
    }
    assert fitted.outside_factor == pytest.approx(shipped_file["outside_factor"], abs=0.002)
    for one, kept in zip(again["kinds"], shipped_file["kinds"], strict=True):
        assert one["kind"] == kept["kind"]
        assert one["replay_margin_blocks"] == pytest.approx(kept["replay_margin_blocks"], abs=0.002)


def test_a_shared_process_gives_the_figures_of_a_process_alone() -> None:
    """Setups that were measured more than once: allocated to two of the smallest blocks, reserved to a small
    segment; with compiled layers, whose compilation allocates as well, to one page of a large one.
    """
    by_setup: dict[tuple[TrainingSetup, bool, str], list[MeasuredPhase]] = {}
    for record in (*usable(EXPANDABLE), *usable(NATIVE)):
        step = record.phase("step")
        assert step is not None
        by_setup.setdefault((record.setup, record.padded, record.allocator), []).append(step)
    repeated = [(setup, steps) for (setup, *_), steps in by_setup.items() if len(steps) > 1]
    assert len(repeated) >= 5
    for setup, steps in repeated:
        allocated = [step.allocated_bytes for step in steps]
        assert max(allocated) - min(allocated) <= 2 * 512
        reserved = [step.reserved_bytes for step in steps]
        assert max(reserved) - min(reserved) <= (2 if setup.compile == "none" else 20) * MIB


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_allocated_memory_against_measured_runs(allocator: str) -> None:
    """Largest error and bias, separately, over every run that was measured; offloading's end hangs on the
    clock where layers are not checkpointed, what a budget of 0.1 keeps of Gemma 3's layers is taken to be
    more than it is, and compiled layers that recompute flex attention held a hidden state more in one run.
    """
    errors = []
    for record in usable(allocator):
        step = record.phase("step")
        assert step is not None
        found = estimate_memory(
            TrainingRun(setup=record.setup, model=load_shipped(record.setup.model), padded=record.padded),
            gpu=H100,
            allocator=allocator,
            replay=True,
        )
        error = found.allocated_bytes / step.allocated_bytes - 1
        setup = record.setup
        clocked = setup.activation_offloading and not setup.gradient_checkpointing
        recomputed = setup.gradient_checkpointing and setup.checkpointed_layers is None
        flex = setup.compile != "none" and recomputed and setup.attn_implementation == "flex_attention"
        bound = 0.025 if clocked else 0.01 if setup.activation_memory_budget else 0.005 if flex else 0.003
        assert abs(error) < bound, record.id
        errors.append(error)
        assert found.weights_bytes == pytest.approx(record.weights_bytes, rel=1e-4)
    assert len(errors) > 120
    assert sorted(map(abs, errors))[len(errors) // 2] < 0.0001
    assert abs(sum(errors) / len(errors)) < 0.001


def test_most_runs_as_launched_reserve_what_was_said() -> None:
    """Each model held out: what is left are requests that find room where the replay has none, or not. Full
    fine-tuning on an H200, with gradients of the embedding as its largest blocks, is least exact: 0.2 to 2%,
    and 6.2% for gemma-3-1b (run 20261201-9a9cffed1a62).
    """
    errors = []
    for gpu in (H100, gpu_catalog().get("h200")):
        found = held_out_residuals(shipped_records(), gpu, load_shipped, allocator=EXPANDABLE)
        errors += [abs(one.reserved_error) for one in found]
    assert len(errors) >= 295
    assert sum(error < 0.0005 for error in errors) > 0.7 * len(errors)
    assert sum(error < 0.005 for error in errors) > 0.89 * len(errors)


def test_full_fine_tuning_reserves_what_is_replayed() -> None:
    """Where a gradient of gigabytes finds room follows from the order of all that a backward pass asks for: a
    bias's and a norm's sums over tokens, a checkpoint's tensors, factors by name, the clipping's sums.
    """
    errors = {}
    for one in shipped_records():
        plain = one.setup.method == "full" and one.setup.compile == "none"
        if not plain or one.outcome != "ok" or one.allocator != EXPANDABLE:
            continue
        step, found = step_and_replay(one)
        assert found.step_allocated_bytes == pytest.approx(step.allocated_bytes, rel=0.0002), one.id
        errors[one.id] = abs(found.step_reserved_bytes / step.reserved_bytes - 1)
    assert len(errors) >= 20
    assert sorted(errors.values())[-2] < 0.0002, errors
    # qwen2.5-1.5b at 2 x 2,048: a step's gradient of the embedding lies elsewhere.
    assert max(errors.values()) < 0.01


def step_and_replay(run: RunRecord) -> tuple[MeasuredPhase, ReplayedMemory]:
    """What a run measured of its steps, and what the replay says of them."""
    step = run.phase("step")
    assert step is not None
    model = load_shipped(run.setup.model)
    return step, replay_steps(
        TrainingRun(setup=run.setup, model=model, padded=run.padded), gpu=H100, allocator=run.allocator
    )


@pytest.mark.parametrize("kernels", ["none", "liger"])
def test_checkpoints_that_were_offloaded_come_back_as_the_runs_show(kernels: str) -> None:
    """To 0.1% of what is allocated; with Liger's kernels more of them wait for the GPU than without."""
    runs = [
        run
        for run in usable(EXPANDABLE)
        if run.setup.activation_offloading
        and run.setup.gradient_checkpointing
        and (run.setup.kernels, run.setup.compile) == (kernels, "none")
    ]
    assert len(runs) >= 6
    for run in runs:
        step, found = step_and_replay(run)
        assert found.step_allocated_bytes == pytest.approx(step.allocated_bytes, rel=0.001), run.id
        assert found.step_reserved_bytes > 0.99 * step.reserved_bytes, run.id


def test_gemma_3_with_ligers_kernels_reserves_what_its_replay_does() -> None:
    """Norms of queries and keys come last there, on copies, and the layers' order shows in the reserve."""
    runs = [
        run
        for run in usable(EXPANDABLE)
        if run.setup.model == "gemma-3-4b"
        and run.setup.kernels == "liger"
        and not run.setup.activation_offloading
    ]
    assert len(runs) >= 5
    for run in runs:
        step, found = step_and_replay(run)
        assert abs(found.step_reserved_bytes - step.reserved_bytes) <= 2 * MIB, run.id


def test_offloading_adds_to_the_context_once_a_step_has_run() -> None:
    setup = TrainingSetup(model="llama-3.1-8b", max_length=2048)
    plain, offloaded = (
        estimate_memory(TrainingRun(setup=one, model=load_shipped(one.model)), gpu=H100)
        for one in (setup, setup.replace(activation_offloading=True))
    )
    beside = [one.process_bytes - one.reserved_bytes for one in (plain, offloaded)]
    assert beside[1] - beside[0] == 74 * MIB
    loads = [one.phases[0] for one in (plain, offloaded)]
    assert (
        loads[0].process_bytes - loads[0].reserved_bytes == loads[1].process_bytes - loads[1].reserved_bytes
    )
    assert sum(one.size_bytes for one in offloaded.components) == offloaded.process_bytes


def test_packed_rows_with_a_mask_reserve_what_their_replay_does() -> None:
    """The mask's conditions lie where later blocks go, so their order shows in the reserve. Compiled layers
    are a page off.
    """
    packed = [
        run
        for run in (*usable(EXPANDABLE), *usable(NATIVE))
        if run.setup.packing and run.setup.attn_implementation in (None, "sdpa")
    ]
    assert len(packed) >= 5
    for run in packed:
        assert not run.padded
        step, found = step_and_replay(run)
        bound = 2 if run.setup.compile == "none" else 22
        assert abs(found.step_reserved_bytes - step.reserved_bytes) <= bound * MIB, run.id


def test_what_cannot_calibrate_is_left_out_or_refused() -> None:
    records = synthetic_records()
    with pytest.raises(InputError, match="2 measured runs are too few"):
        calibrate(records[:2], H100, load_shipped, name="x", allocator=NATIVE)
    with pytest.raises(InputError, match="expandable_segments: 0 measured runs are too few"):
        calibrate(records, H100, load_shipped, name="x", allocator=EXPANDABLE)
    odd = [
        dataclasses.replace(records[0], outcome="oom"),
        dataclasses.replace(records[1], phases=()),
        dataclasses.replace(records[2], source="train"),
        dataclasses.replace(records[3], setup=records[3].setup.replace(num_processes=2, distributed="ddp")),
        dataclasses.replace(records[4], environment=dataclasses.replace(records[4].environment, gpu_id="l4")),
    ]
    assert samples_of(odd, H100, load_shipped) == []
    shared = [dataclasses.replace(record, isolated=False) for record in records]
    with pytest.raises(InputError, match="context"):
        calibrate(shared, H100, load_shipped, name="x", allocator=NATIVE)


def test_coefficients_round_trip_and_are_checked() -> None:
    assert Coefficients.from_dict(json.loads(json.dumps(KNOWN.to_dict()))) == KNOWN
    with pytest.raises(InputError, match="not calibration coefficients"):
        Coefficients.from_dict({"name": "x"})
    with pytest.raises(InputError, match="5 numbers"):
        dataclasses.replace(KNOWN, reserve_per_byte=(1.0,))
    with pytest.raises(FieldError):
        dataclasses.replace(KNOWN, context_bytes=-1)
    terms = ReserveTerms(working_bytes=10, head_bytes=10, kept_bytes=20, weight_bytes=10, optimizer_bytes=10)
    assert KNOWN.reserve_bytes(terms) == 20 * MIB + 3 + 2 + 1 + 4 + 1
    shares = KindShares(kind="full", margin_fraction=1.0, replay_margin_blocks=2.0)
    by_kind = dataclasses.replace(KNOWN, margin_fraction=0.5, kinds=(shares,))
    assert (by_kind.margin(terms, "kept"), by_kind.margin(terms, "full")) == (30, 60)
    assert by_kind.replay_margin(MIB, "full") == 2 * MIB + UNKNOWN_REPLAY_MARGIN_BYTES
    assert Coefficients.from_dict(json.loads(json.dumps(by_kind.to_dict()))) == by_kind


def test_coefficients_from_before_the_replay_get_a_wide_margin() -> None:
    older = {name: value for name, value in KNOWN.to_dict().items() if not name.startswith("replay_")}
    found = Coefficients.from_dict(json.loads(json.dumps(older)))
    assert found.replay_margin_bytes == UNKNOWN_REPLAY_MARGIN_BYTES
    assert found.replay_margin(10 * MIB, "kept") == 15 * MIB + UNKNOWN_REPLAY_MARGIN_BYTES


def test_a_persons_own_calibration_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path))
    folder = tmp_path / "calibration"
    folder.mkdir()
    coefficients_for.cache_clear()
    try:
        own = dataclasses.replace(KNOWN, name="own")
        (folder / "own.json").write_text(json.dumps(own.to_dict()))
        assert coefficients_for("h100-80gb", NATIVE).name == "own"
        assert coefficients_for("h100-80gb", EXPANDABLE).name == "h100-80gb"
        assert coefficients_for("l4", NATIVE).name != "own"
        (folder / "own.json").write_text("{")
        coefficients_for.cache_clear()
        with pytest.raises(InputError, match=r"own\.json"):
            coefficients_for("h100-80gb", NATIVE)
    finally:
        coefficients_for.cache_clear()


def test_workspaces_and_managed_memory() -> None:
    assert cublas_workspace_bytes(H100, KNOWN) == KNOWN.workspace_bytes
    assert cublas_workspace_bytes(None, KNOWN) == 64 * MIB
    assert cublas_workspace_bytes(gpu_catalog().get("rtx-4090"), KNOWN) == 2 * 8_519_680
    assert managed_process_bytes(0) == 0
    assert managed_process_bytes(1) == managed_process_bytes(128 * MIB) == 128 * MIB


def test_a_short_calibration_has_the_intervals_of_all_runs() -> None:
    """Where blocks come to lie is torch's doing: a few quiet runs on one GPU do not narrow the interval."""
    h200 = gpu_catalog().get("h200")
    own = [record for record in shipped_records() if record.environment.gpu_id == "h200"]
    alone = calibrate(own, h200, load_shipped, name="x", allocator=NATIVE).coefficients
    among_all = calibrate(shipped_records(), h200, load_shipped, name="x", allocator=NATIVE).coefficients
    assert len(alone.record_ids) > 50
    assert among_all.record_ids == alone.record_ids
    assert among_all.context_bytes == alone.context_bytes
    shares = [
        next(kind.replay_margin_blocks for kind in one.kinds if kind.kind == "checkpointed")
        for one in (among_all, alone)
    ]
    assert shares[0] > 3 * shares[1]
    assert among_all.coverage != alone.coverage
