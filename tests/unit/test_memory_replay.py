"""Layer programs and the replay of whole steps through torch's caching allocator."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.calibration.accuracy import shipped_records
from planner.calibration.records import RunRecord
from planner.calibration.samples import CAP_SHARE, samples_of
from planner.gpus.catalog import gpu_catalog
from planner.memory import MemoryBreakdown, estimate_memory, surely_exceeds
from planner.memory.allocators.expandable import empty_allocator
from planner.memory.allocators.native import MIB
from planner.memory.breakdown import FITTED, REPLAYED
from planner.memory.decoder.groups import LayerGroup, layer_groups
from planner.memory.decoder.live_bytes import layer_memory, peak
from planner.memory.decoder.programs import group_program
from planner.memory.step import replay
from planner.memory.step.replay import replay_steps
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import ALLOCATORS, EXPANDABLE, NATIVE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

H100 = gpu_catalog().get("h100-80gb")
KNOBS: tuple[dict[str, object], ...] = (
    {},
    {"gradient_checkpointing": False},
    {"checkpointed_layers": 3},
    {"method": "lora", "lora_dropout": 0.05},
    {"method": "full", "optim": "adafactor"},
    {"method": "full", "gradient_accumulation_steps": 2, "gradient_checkpointing": False},
    {"attn_implementation": "eager"},
    {"dtype": "float16"},
)
MODELS = ("smollm2-135m", "gemma-3-1b", "olmo-2-1b", "phi-4-mini")


def setup_of(model: str, **knobs: object) -> TrainingSetup:
    return TrainingSetup.from_dict({"model": model, "max_length": 512, **knobs})


def parts_of(setup: TrainingSetup) -> tuple[LayerGroup, ...]:
    model = load_shipped(setup.model)
    found, _ = layer_groups(TrainingRun(setup=setup, model=model, padded=False))
    return found


def live_peaks(part: LayerGroup, tokens: int, scores: int) -> tuple[float, float]:
    """The most a program holds in forward and in backward, its input and the gradient given left out."""
    program = group_program(part, accumulating=part.knobs.default.accumulating)
    sizes = [a + b * tokens + c * scores for a, b, c in program.blocks]
    peaks, live = [], 0.0
    for events in (program.forward, program.backward):
        most = 0.0
        for event in events:
            live += sizes[event] if event >= 0 else -sizes[-1 - event]
            most = max(most, live)
        peaks.append(most)
        if part.checkpointed:
            live = 0.0
    return peaks[0], peaks[1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_programs_hold_what_the_live_replay_counts(model: str, knobs: dict[str, object]) -> None:
    """The ordered events and the counted moments come from the same replay, so their peaks agree."""
    for part in parts_of(setup_of(model, **knobs)):
        tokens, scores = 2048, 2 * 1024**2
        counted = layer_memory(
            part.layer,
            part.knobs,
            checkpointed=part.checkpointed,
            input_requires_grad=part.input_requires_grad,
        )
        stream = tokens * part.input_bytes_per_token
        forward, backward = live_peaks(part, tokens, scores)
        # The counted backward pass has the incoming gradient, which the program is given; a layer without
        # checkpoint counts its input, which is given too.
        assert backward == pytest.approx(peak(counted.backward, tokens, scores)[0], abs=2.01 * stream)
        moments = counted.forward_saving or counted.forward
        assert forward == pytest.approx(peak(moments, tokens, scores)[0], abs=1.01 * stream, rel=0.02)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_program_frees_all_but_what_it_says(name: str) -> None:
    for model in MODELS:
        for knobs in KNOBS:
            for part in parts_of(setup_of(model, **knobs)):
                program = group_program(part, accumulating=False)
                allocator = empty_allocator(name)
                units = program.units(1024, 1024**2)
                slots = [0] * len(units)
                slots[0] = allocator.allocate(units[0])
                allocator.run(program.forward, units, slots)
                for block in (program.output, *program.casts):
                    allocator.free(slots[block])
                slots[program.incoming] = allocator.allocate(1)
                allocator.run(program.backward, units, slots)
                left = {*program.gradients}
                left |= {program.outgoing} if program.outgoing is not None else set()
                left |= {0} if program.checkpointed else set()
                for block in left:
                    allocator.free(slots[block])
                assert allocator.allocated_bytes == 0, (model, knobs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_replayed_parts_sum_and_lie_near_the_counted_ones(
    model: str, knobs: dict[str, object], allocator: str
) -> None:
    setup = setup_of(model, **knobs)
    fitted = estimate_memory(
        TrainingRun(setup=setup, model=load_shipped(model)), gpu=H100, allocator=allocator
    )
    replayed = estimate_memory(
        TrainingRun(setup=setup, model=load_shipped(model)), gpu=H100, replay=True, allocator=allocator
    )
    assert sum(part.size_bytes for part in replayed.components) == replayed.process_bytes
    assert replayed.weights_bytes == fitted.weights_bytes
    # The count leaves out the default's unsplit rests, and what autocast and Adafactor hold beside the rest.
    alike = allocator == EXPANDABLE and not knobs.keys() & {"dtype", "lora_dropout", "optim"}
    near = pytest.approx(fitted.allocated_bytes, rel=0 if alike else 0.02, abs=MIB / 8 if alike else 32 * MIB)
    assert replayed.allocated_bytes == near
    assert replayed.reserved_bytes >= replayed.allocated_bytes
    assert replayed.reserved_bytes % (2 * MIB) == 0
    assert replayed.process_upper_bytes > replayed.process_bytes
    assert (fitted.basis.reserve, replayed.basis.reserve) == (FITTED, REPLAYED)
    phases = {phase.name: phase for phase in replayed.phases}
    assert phases["evaluation"].reserved_bytes >= phases["step"].reserved_bytes
    assert phases["save"].reserved_bytes == phases["step"].reserved_bytes
    assert phases["load"].reserved_bytes <= phases["step"].reserved_bytes


@given(
    length=st.sampled_from((256, 512, 768)),
    batch=st.integers(1, 4),
    rank=st.sampled_from((8, 16, 32)),
    knobs=st.sampled_from(({}, {"gradient_checkpointing": False}, {"method": "lora"})),
    allocator=st.sampled_from(ALLOCATORS),
)
@settings(max_examples=15, deadline=None)
def test_twice_the_batch_or_rank_never_allocates_less(
    length: int, batch: int, rank: int, knobs: dict[str, object], allocator: str
) -> None:
    """Reserved memory may fall when sizes change (blocks fit better); what is handed out does not."""
    setup = setup_of("smollm2-135m", **knobs).replace(
        max_length=length, per_device_train_batch_size=batch, lora_r=rank
    )
    model = load_shipped(setup.model)

    def allocated(changed: TrainingSetup) -> int:
        found = replay_steps(
            TrainingRun(setup=changed, model=model, padded=False), gpu=H100, allocator=allocator
        )
        return found.step_allocated_bytes

    assert allocated(setup) <= allocated(setup.replace(per_device_train_batch_size=2 * batch))
    assert allocated(setup) <= allocated(setup.replace(lora_r=2 * rank))


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_accumulating_more_than_twice_changes_nothing(allocator: str) -> None:
    model = load_shipped("smollm2-135m")
    for knobs in ({}, {"method": "full"}):
        twice = setup_of("smollm2-135m", gradient_accumulation_steps=2, **knobs)
        often = twice.replace(gradient_accumulation_steps=16)
        assert replay_steps(
            TrainingRun(setup=twice, model=model, padded=False), gpu=H100, allocator=allocator
        ) == replay_steps(TrainingRun(setup=often, model=model, padded=False), gpu=H100, allocator=allocator)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_expandable_segments_hand_out_no_more_than_the_default(knobs: dict[str, object]) -> None:
    """The rest of a block is split off however small, so blocks in use come to the same or less."""
    setup, model = setup_of("smollm2-135m", **knobs), load_shipped("smollm2-135m")
    native, expandable = (
        replay_steps(TrainingRun(setup=setup, model=model, padded=False), gpu=H100, allocator=name)
        for name in (NATIVE, EXPANDABLE)
    )
    assert expandable.load_allocated_bytes <= native.load_allocated_bytes
    assert expandable.step_allocated_bytes < native.step_allocated_bytes
    # A replay is remembered for its allocator.
    assert (
        replay_steps(TrainingRun(setup=setup, model=model, padded=False), gpu=H100, allocator=NATIVE)
        is native
    )


def test_a_replay_that_ends_early_has_told_the_truth() -> None:
    """Of a card with a byte less than the whole replay needs it says so; of one with as much it does not."""
    moved: dict[str, object] = {"activation_offloading": True}
    shared: dict[str, object] = {"num_processes": 2, "distributed": "fsdp", "optim": "adamw_torch"}
    cases = ((KNOBS[0], EXPANDABLE), (KNOBS[1], NATIVE), (moved, EXPANDABLE), (shared, EXPANDABLE))
    for knobs, allocator in cases:
        setup = setup_of("smollm2-135m", **knobs)
        run = TrainingRun(setup=setup, model=load_shipped(setup.model), padded=False)
        size = estimate_memory(run, gpu=H100, replay=True, allocator=allocator).peak_upper_bytes
        for less, exceeds in ((0, False), (1, True), (size // 3, True)):
            replay._WHOLE.clear()
            usable = size - less
            assert surely_exceeds(run, gpu=H100, usable_bytes=usable, allocator=allocator) == exceeds, knobs
            assert bool(replay._WHOLE) != exceeds


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_paged_state_stays_out_of_the_allocator(allocator: str) -> None:
    model = load_shipped("llama-3.2-1b")
    setup = setup_of("llama-3.2-1b", method="full")
    found = [
        replay_steps(
            TrainingRun(setup=setup.replace(optim=optim), model=model, padded=False),
            gpu=H100,
            allocator=allocator,
        ).step_reserved_bytes
        for optim in ("sgd", "paged_adamw_32bit", "adamw_8bit", "adamw_torch")
    ]
    assert found[0] < found[2] < found[3]
    assert found[1] == pytest.approx(found[0], rel=0.01)


def estimated(record: RunRecord) -> MemoryBreakdown:
    return estimate_memory(
        TrainingRun(setup=record.setup, model=load_shipped(record.setup.model), padded=record.padded),
        gpu=H100,
        replay=True,
        allocator=record.allocator,
    )


def held_out_errors(record: RunRecord) -> tuple[float, float]:
    """Errors of allocated and reserved: a replay rests on no record, so every model is held out."""
    step = record.phase("step")
    assert step is not None
    found = estimated(record)
    return (
        found.allocated_bytes / step.allocated_bytes - 1,
        found.reserved_bytes / step.reserved_bytes - 1,
    )


@pytest.mark.parametrize(
    ("allocator", "middle", "nineteen_in_twenty", "most"),
    # In expandable segments two runs of small models had a gap that the head's largest block fitted in, and
    # the replay lacks it by a little.
    [(NATIVE, 0.01, 0.06, 0.10), (EXPANDABLE, 0.002, 0.04, 0.20)],
)
def test_replayed_memory_against_measured_runs(
    allocator: str, middle: float, nineteen_in_twenty: float, most: float
) -> None:
    samples = samples_of(shipped_records(), H100, load_shipped)
    records = [sample.record for sample in samples if sample.record.allocator == allocator]
    sample = random.Random(0).sample(records, min(200, len(records)))
    errors = [held_out_errors(record) for record in sample]
    allocated = sorted(abs(error) for error, _ in errors)
    reserved = sorted(abs(error) for _, error in errors)
    assert statistics.median(allocated) < 0.0005
    # Offloading without checkpointing: what comes back, and when, is the copies' own time.
    assert allocated[-1] < 0.03
    assert allocated[int(0.95 * len(allocated))] < 0.005
    assert statistics.median(reserved) < middle
    assert reserved[int(0.95 * len(reserved))] < nineteen_in_twenty
    assert reserved[-1] < most


def below_their_cap() -> list[RunRecord]:
    """Runs under a memory cap that their allocator never met."""
    found = []
    for record in shipped_records():
        step = record.phase("step")
        if not record.fills_its_length or not record.memory_cap_bytes:
            continue
        if step and step.reserved_bytes < CAP_SHARE * record.memory_cap_bytes:
            found.append(record)
    return found


def test_plans_own_choices_reserved_no_more_than_the_upper_end() -> None:
    assert len(below_their_cap()) >= 10
    for record in below_their_cap():
        step = record.phase("step")
        assert step is not None
        found = estimated(record)
        margin = found.process_upper_bytes - found.process_bytes
        assert step.reserved_bytes <= found.reserved_bytes + margin, record.id
