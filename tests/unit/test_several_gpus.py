"""Several GPUs, counted: what each holds and how fast they are, by properties and by runs on two H200s."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from typing import Any

import pytest

from planner.answers.plan import Plan
from planner.base.errors import InputError, NotModelledError
from planner.base.units import MIB
from planner.calibration.accuracy import several_gpus, several_records, shipped_records
from planner.calibration.records import MeasuredPhase
from planner.data.lengths import DatasetStats
from planner.gpus.catalog import gpu_catalog
from planner.gpus.links import LINKS_FILE, UNKNOWN, link_of
from planner.gpus.target import GpuTarget, resolve_gpu
from planner.memory import MemoryBreakdown, estimate_memory
from planner.memory.estimate import live_memory
from planner.memory.held.shards import units_of
from planner.memory.measured.files import coefficients_for
from planner.models.catalog import load_shipped
from planner.planning.make_plan import make_plan
from planner.planning.ways import with_processes
from planner.search.evaluator import Evaluator
from planner.search.strategies import modes
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.parallelism import BY_ACCELERATE
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.stack import TRL
from planner.setup.training_setup import TrainingSetup
from planner.throughput import StepEstimate, estimate_step
from planner.throughput.epoch import Examples
from planner.throughput.sharing import slowest_of

GIB = 2**30
H200 = gpu_catalog().get("h200")
DDP = {"num_processes": 2, "distributed": "ddp", "optim": "adamw_8bit"}
FSDP = {"num_processes": 2, "distributed": "fsdp", "optim": "adamw_torch_fused"}
LORA = {"method": "lora"}


def run_of(model: str = "llama-3.1-8b", *, sharding: Any = None, **knobs: Any) -> TrainingRun:
    defaults = {"model": model, "max_length": 2048, "per_device_train_batch_size": 4}
    stack = TRL if sharding is None else dataclasses.replace(TRL, sharding=sharding)
    setup = TrainingSetup.from_dict({**defaults, **knobs})
    return TrainingRun(setup=setup, model=load_shipped(model), stack=stack)


def estimate(*arguments: Any, **knobs: Any) -> MemoryBreakdown:
    return estimate_memory(run_of(*arguments, **knobs), gpu=H200)


def parts(breakdown: MemoryBreakdown) -> dict[str, int]:
    return {part.name: part.size_bytes for part in breakdown.components}


def step(gpu: str = "h200", **knobs: Any) -> StepEstimate:
    return estimate_step(run_of(**knobs), gpu_catalog().get(gpu))


@pytest.mark.parametrize(
    ("knobs", "between_steps", "in_steps"),
    [
        (DDP, None, 9.520),
        ({**DDP, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, None, 6.721),
        (FSDP, 2.887, 7.006),
        ({**FSDP, **LORA}, 7.776, 12.504),
    ],
)
def test_two_h200s_held_what_is_counted(
    knobs: dict[str, Any], between_steps: float | None, in_steps: float
) -> None:
    """Llama-3.1-8B, rank 16 on all linear layers, checkpointed, random weights, torch 2.11, accelerate 1.15
    without the launcher, 2026-11-30: GiB that torch had allocated on each.
    """
    live = live_memory(
        run_of(sharding=BY_ACCELERATE, **knobs),
        gpu=H200,
        coefficients=coefficients_for("h200", EXPANDABLE),
        allocator=EXPANDABLE,
    )
    resident = live.resident.allocated_bytes
    assert (resident + live.peak.total_bytes) / GIB == pytest.approx(in_steps, rel=0.001)
    if between_steps is not None:
        assert (resident - live.resident.tables_bytes) / GIB == pytest.approx(between_steps, rel=0.001)


@pytest.mark.parametrize(
    ("knobs", "reserved"),
    [
        (DDP, 9.99),
        ({**DDP, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, 7.16),
    ],
)
def test_two_h200s_reserved_what_is_replayed_with_ddp(knobs: dict[str, Any], reserved: float) -> None:
    """The same runs. What DDP sends before the first step leaves holes, which small steps do not fill."""
    found = estimate_memory(run_of(**knobs), gpu=H200, replay=True, allocator=EXPANDABLE)
    assert found.reserved_bytes / GIB == pytest.approx(reserved, rel=0.01)


@pytest.mark.parametrize(
    "knobs",
    [
        DDP,
        FSDP,
        {**FSDP, **LORA},
        {**FSDP, "gradient_accumulation_steps": 4},
        {**FSDP, "compile": "regional"},
        {**FSDP, **LORA, "compile": "regional", "gradient_checkpointing": False},
    ],
)
def test_a_replay_comes_to_what_is_counted(knobs: dict[str, Any]) -> None:
    counted, replayed = (
        estimate_memory(run_of(**knobs), gpu=H200, replay=replay) for replay in (False, True)
    )
    assert replayed.allocated_bytes == pytest.approx(counted.allocated_bytes, rel=0.002)
    assert replayed.reserved_bytes >= replayed.allocated_bytes


@pytest.mark.parametrize("knobs", [{}, LORA, {"method": "full"}])
def test_what_is_shared_out_falls_with_the_gpus_and_the_rest_does_not(knobs: dict[str, Any]) -> None:
    one = parts(estimate(optim="adamw_torch_fused", **knobs))
    two, eight = (parts(estimate(**{**FSDP, **knobs, "num_processes": n})) for n in (2, 8))
    for name in ("weights_4bit", "adapter", "optimizer"):
        assert two[name] == pytest.approx(one[name] / 2, rel=0.01)
        assert eight[name] == pytest.approx(one[name] / 8, rel=0.01)
    gathered = {
        units_of(run_of(**{**FSDP, **knobs, "num_processes": n})).layers[0].flat_bytes for n in (2, 8)
    }
    assert len(gathered) == 1
    if knobs != {"method": "full"}:
        # Of full fine-tuning another moment may be the peak.
        for name in ("gathered", "activations", "context", "head_and_loss"):
            assert eight[name] == two[name], name
        head = 128_256 * 4096 * 2
        # The norms and, of a 16-bit base, the linear layers are shared out beside the whole head.
        shared = one["weights_unquantized"] - 2 * head
        assert eight["weights_unquantized"] == pytest.approx(head + shared / 8, rel=0.01)


@pytest.mark.parametrize("knobs", [{}, LORA, {"method": "full", "optim": "adamw_torch_fused"}])
def test_ddp_is_one_gpu_and_the_gradients_once_more(knobs: dict[str, Any]) -> None:
    alone, shared = run_of(**{"optim": DDP["optim"], **knobs}), run_of(**{**DDP, **knobs})
    one, two = (estimate_memory(run, gpu=H200) for run in (alone, shared))
    gained, trained = two.allocated_bytes - one.allocated_bytes, alone.trained.size_bytes
    if alone.adapter is not None:
        assert gained == pytest.approx(trained, rel=0.03)
    assert parts(two)["gradient_buckets"] == trained
    assert parts(two)["nccl"] == 286 * MIB
    assert gained <= trained


def test_one_process_has_no_part_of_several() -> None:
    assert not {"gathered", "gradient_buckets", "nccl"} & set(parts(estimate()))
    assert step().sharing is None


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"optim": "adamw_8bit"}, "optim adamw_8bit does not work with distributed fsdp"),
        ({"optim": "paged_adamw_8bit"}, "use adamw_torch_fused"),
        ({"use_dora": True}, "use_dora does not work with distributed fsdp"),
        ({"dtype": "float16"}, "float16 does not work with distributed fsdp"),
        ({"lora_r": 4, "num_processes": 8}, "lora_r 4 does not work for 8 processes"),
    ],
)
def test_what_fsdp_cannot_train_is_refused_by_name(knobs: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        estimate(**{**FSDP, **knobs})
    if "num_processes" not in knobs:
        estimate(**{**DDP, **knobs})


def test_what_is_not_counted_with_fsdp_is_refused_by_name() -> None:
    with pytest.raises(NotModelledError, match="distributed=fsdp with activation_offloading"):
        estimate(**FSDP, activation_offloading=True)


def test_70b_trains_on_two_cards_of_24_gb_and_the_plan_says_what_the_others_lack() -> None:
    plan = make_plan(make_request("llama-3.1-70b", gpu="2x24GB", knobs={"max_length": 512}), whole=False)
    assert plan.fits
    assert (plan.setup.distributed, plan.setup.num_processes) == ("fsdp", 2)
    assert plan.setup.optim == "adamw_torch_fused"
    assert plan.setup.effective_batch_size == 16
    assert plan.memory.peak_upper_bytes <= plan.gpu.usable_bytes
    assert plan.speed is not None
    lost = {one.distributed: one for one in plan.ways}
    assert lost["fsdp"].lost == ""
    for way in (None, "ddp"):
        assert lost[way].lost == "too large"
        assert lost[way].amount > 10 * GIB
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.ways == plan.ways
    assert again.speed == plan.speed


def test_a_price_is_that_of_all_gpus_and_the_batch_is_kept() -> None:
    plan = make_plan(make_request("llama-3.1-8b", gpu="2xh200", price_usd_per_hour=3.0), whole=False)
    assert plan.setup.num_processes == 2
    assert plan.duration is not None
    assert plan.duration.usd == pytest.approx(2 * 3.0 * plan.duration.hours)
    assert plan.setup.effective_batch_size == 16
    one = next(way for way in plan.ways if way.distributed is None)
    assert one.lost == "slower"
    assert one.usd == pytest.approx(3.0 * (one.hours or 0.0))


def test_a_plan_for_one_gpu_has_no_word_of_several() -> None:
    told = make_plan(make_request("qwen2.5-0.5b", gpu="24GB"), whole=False).to_dict()
    assert "ways" not in told
    assert "sharing" not in told["speed"]
    assert not {"least_usable_bytes", "positions"} & set(told["gpu"])


def test_as_many_gpus_are_planned_for_as_are_asked_for() -> None:
    request = make_request("llama-3.1-8b", gpu="a40", knobs={"num_processes": 4})
    assert with_processes(request, resolve_gpu("a40")).count == 4
    machines = with_processes(dataclasses.replace(request, gpu=None), resolve_gpu("a40"))
    assert machines.count == 4
    assert "what crosses machines is forecast as within one" in machines.notes[-1]


def test_all_gpus_of_a_machine_leave_what_the_fullest_leaves() -> None:
    one = resolve_gpu("rtx-4090")
    least = one.usable_bytes - 3 * GIB
    target = dataclasses.replace(one, count=2, least_usable_bytes=least, positions=(0, 1))
    assert target.of_all().usable_bytes == least
    assert target.of_all().held_bytes == one.held_bytes + 3 * GIB
    plan = make_plan(make_request("llama-3.1-8b"), target=target, whole=False)
    assert plan.setup.num_processes == 2
    assert plan.gpu.usable_bytes == least
    assert GpuTarget.positions is not None
    assert plan.gpu.positions == (0, 1)


@pytest.mark.parametrize(
    ("lora_r", "processes", "works"),
    [(16, 2, True), (16, 8, True), (16, 5, False), (8, 7, False), (4, 3, False)],
)
def test_no_gpu_is_left_without_a_row_of_an_adapter(lora_r: int, processes: int, works: bool) -> None:
    setup = TrainingSetup(
        model="llama-3.1-8b", max_length=512, lora_r=lora_r, num_processes=processes, distributed="fsdp"
    )
    assert setup.every_process_has_rows is works
    assert works is all(row * -(-lora_r // processes) < lora_r for row in range(processes))


def test_a_run_takes_gpus_that_are_alike_and_side_by_side() -> None:
    card = resolve_gpu("rtx-4090")
    second = dataclasses.replace(card, count=2, position=1, positions=(0, 1))
    assert (second.first_position(1), second.first_position(2)) == (1, 0)
    assert dataclasses.replace(card, count=3, position=3, positions=(0, 2, 3)).first_position(2) == 2
    assert card.first_position(2) == 0
    for places, why in (((0, 2), "side by side"), ((1,), "shows 1 x rtx-4090"), ((), "2 GPUs are needed")):
        with pytest.raises(InputError, match=why):
            dataclasses.replace(card, position=0, positions=places).first_position(2)


def test_every_card_of_the_catalog_has_a_link_with_a_source() -> None:
    found = tomllib.loads(LINKS_FILE.read_text(encoding="utf-8"))
    assert set(found) == {gpu.id for gpu in gpu_catalog()}
    for id_, table in found.items():
        assert len(table["source"]) > 10, id_
        rate = link_of(id_).rate(2)
        assert 0 < rate.low <= rate.expected <= rate.high, id_
    assert link_of("no-such-card") is UNKNOWN


def test_what_is_not_known_of_a_link_widens_the_interval() -> None:
    sure, bridge = link_of("h200"), link_of("rtx-3090")
    assert sure.rate(2).high / sure.rate(2).low < 1.5
    assert bridge.rate(2).high / bridge.rate(2).low > 10
    # A bridge joins two cards.
    assert bridge.rate(4).high < bridge.rate(2).high
    large = {"model": "llama-3.1-70b", "max_length": 512, "per_device_train_batch_size": 1, **FSDP}
    found = step("rtx-3090", **large)
    alone = step("rtx-3090", **{**large, "num_processes": 1, "distributed": None})
    width, usual = (one.tokens_per_second_high / one.tokens_per_second_low for one in (found, alone))
    assert width > 1.5 * usual


@pytest.mark.parametrize("knobs", [DDP, FSDP, {**FSDP, "method": "full"}])
def test_more_gpus_are_faster_and_never_more_than_so_many_times(knobs: dict[str, Any]) -> None:
    rates = []
    for count in (2, 4, 8):
        found = step(**{**knobs, "num_processes": count})
        assert found.sharing is not None
        assert 0.5 * count < found.sharing.scaling <= count
        assert found.tokens_per_second_low <= found.tokens_per_second <= found.tokens_per_second_high
        rates.append(found.tokens_per_second)
    assert rates == sorted(rates)


def test_a_slow_link_costs_what_has_to_be_gathered() -> None:
    """Of weights in 16 bits a pass gathers four times the bytes of those in 4."""
    narrow, wide = (
        step("rtx-4090", **{**FSDP, **knobs, "per_device_train_batch_size": 1, "max_length": 512})
        for knobs in ({}, LORA)
    )
    assert narrow.sharing is not None
    assert wide.sharing is not None
    assert wide.sharing.received_bytes > 3 * narrow.sharing.received_bytes
    assert wide.sharing.scaling < narrow.sharing.scaling
    assert slowest_of(2) < slowest_of(4) < slowest_of(16)


def test_all_wait_for_the_longest_batch() -> None:
    stats = DatasetStats.from_lengths(
        [100] * 90 + [2000] * 10, loss_tokens=29_000, loss_on="all", data_format="text", estimated=False
    )
    examples = Examples(stats)
    setup = TrainingSetup.from_dict({"model": "llama-3.1-8b", "max_length": 2048, **DDP})
    mean = {
        count: sum(batch.longest * batch.share for batch in examples.slowest_batches(one))
        for count, one in ((1, setup.replace(num_processes=1, distributed=None)), (2, setup))
    }
    assert mean[2] > 1.3 * mean[1]


def test_a_run_on_several_gpus_is_shown_by_the_rank_that_is_furthest_off() -> None:
    run = run_of(**DDP)
    said = estimate_memory(run, gpu=H200, replay=True, allocator=EXPANDABLE)
    phases = tuple(
        MeasuredPhase(
            name="step",
            allocated_bytes=int(said.allocated_bytes * share),
            reserved_bytes=said.reserved_bytes,
            process_bytes=None,
        )
        for share in (1.0, 0.98)
    )
    measured = next(r for r in shipped_records() if r.environment.gpu_id == "h200")
    record = dataclasses.replace(
        measured,
        setup=run.setup,
        phases=phases[:1],
        ranks=tuple((phase,) for phase in phases),
        tokens_per_second=None,
        allocator=EXPANDABLE,
        padded=False,
    )
    (found,) = several_gpus([record])
    assert found.allocated == pytest.approx(1 / 0.98 - 1, abs=1e-4)
    assert found.speed is None
    assert found.within_interval


def test_what_two_ranks_allocated_and_reserved_is_what_is_said() -> None:
    """Committed runs of the launcher's own layout, two ranks on one H200 that talk over the host: FSDP2 and
    DDP, QLoRA, LoRA and full fine-tuning, a 70B held to what a 24 GB card leaves among them.
    """
    found = several_gpus(several_records())
    assert len(found) >= 14
    assert {one.distributed for one in found} == {"ddp", "fsdp"}
    assert {one.method for one in found} == {"qlora", "lora", "full"}
    assert any(one.model == "llama-3.1-70b" for one in found)
    for one in found:
        assert one.allocated is not None
        assert one.reserved is not None
        assert one.process is not None
        assert abs(one.allocated) < 0.001, one
        assert abs(one.reserved) < 0.02, one
        assert abs(one.process) < 0.03, one
        assert one.within_interval, one
    assert sorted(abs(one.allocated or 0.0) for one in found)[len(found) // 2] < 0.0005


def test_layers_are_compiled_with_fsdp_where_that_is_asked_for_and_not_by_choice() -> None:
    asked = estimate(**FSDP, compile="regional", gradient_checkpointing=False)
    assert asked.allocated_bytes < estimate(**FSDP, gradient_checkpointing=False).allocated_bytes
    run = run_of(**FSDP)
    evaluator = Evaluator(run.model, H200, H200.usable_bytes)
    assert [mode.knobs for mode in modes(run.setup, evaluator, {})] == [()]
    ddp = run_of(**DDP).setup
    assert [mode.knobs for mode in modes(ddp, evaluator, {})] == [(), (("compile", "regional"),)]


def test_compiled_sharded_layers_are_forecast_as_compiled_ones_are() -> None:
    """What compiling saves is one GPU's; what GPUs send each other is the same."""
    eager, compiled = (step(**FSDP, compile=how) for how in ("none", "regional"))
    assert compiled.tokens_per_second > eager.tokens_per_second


@pytest.mark.parametrize("knobs", [DDP, FSDP])
def test_no_two_parts_of_a_plan_for_several_gpus_share_a_colour(knobs: dict[str, Any]) -> None:
    pytest.importorskip("textual")
    from launcher.tui.themes import component_colours

    found = component_colours(parts(estimate(**knobs)))
    assert len(set(found.values())) == len(found)
