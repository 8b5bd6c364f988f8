"""The table of kinds of work: nothing in it is forgotten by rates, files, forecasts or the fit."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from planner.base.data_files import PROFILES
from planner.base.errors import FieldError, InputError
from planner.calibration.accuracy import shipped_records
from planner.calibration.speed_problem import UNKNOWNS, RatesProblem, host_factor
from planner.gpus.catalog import gpu_catalog
from planner.models.catalog import catalog_ids, load_shipped
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.by_kind import ByKind
from planner.throughput.microbenchmarks import Slowdown
from planner.throughput.rates import Rates, micro_step_time, rates_for, scaled_rates
from planner.throughput.traffic import OPTIMIZER, OPTIMIZER_CALLS
from planner.throughput.work import StepWork, step_work
from planner.throughput.work_kinds import SCALES, WORK_KINDS, Per, WorkKind

NAMES = [kind.name for kind in WORK_KINDS]


def known(gpu: str) -> Rates:
    rates = rates_for(gpu_catalog().get(gpu))
    assert rates is not None
    return rates


@pytest.mark.parametrize("path", sorted((PROFILES / "calibration" / "throughput").glob("*.json")), ids=str)
def test_a_file_of_rates_is_written_as_it_was_read(path: object) -> None:
    text = path.read_text()  # type: ignore[attr-defined]
    assert json.dumps(Rates.from_dict(json.loads(text)).to_dict(), indent=1) + "\n" == text


@pytest.mark.parametrize("kind", WORK_KINDS, ids=NAMES)
def test_a_unit_of_work_takes_its_rate_in_a_forecast(kind: WorkKind) -> None:
    """Of each kind alone: a pass's twice, once in either pass; nothing else takes any time."""
    rates = known("h100-80gb")
    one = {per: ByKind.counted(per) for per in ("pass", "micro_step", "optimizer_step")}
    one[kind.per] = ByKind.counted(kind.per, **{kind.name: 1.0})
    work = StepWork(
        total_flops=0.0,
        forward=one["pass"],
        backward=one["pass"],
        micro_step=one["micro_step"],
        optimizer_step=one["optimizer_step"],
    )
    times = 2 if kind.per == "pass" else 1
    seconds = micro_step_time(rates, work).seconds + rates.optimizer_seconds(work)
    assert seconds == pytest.approx(times * rates.seconds[kind.name], rel=1e-12)


def made_up_work(rates: Rates, random: np.random.Generator) -> StepWork:
    """Milliseconds of every kind of work."""

    def some(per: Per) -> ByKind:
        mine = [kind for kind in WORK_KINDS if kind.per == per]
        amounts = {kind.name: random.uniform(1e-3, 1e-2) / rates.seconds[kind.name] for kind in mine}
        return ByKind.counted(per, **amounts)

    return StepWork(
        total_flops=0.0,
        forward=some("pass"),
        backward=some("pass"),
        micro_step=some("micro_step"),
        optimizer_step=some("optimizer_step"),
    )


def test_the_fit_solves_for_what_forecasts_add_up() -> None:
    """Its equations at given rates are the forecast with them."""
    assert sorted(NAMES) == sorted(kind.name for kind in UNKNOWNS)
    rates, random = known("h100-80gb"), np.random.default_rng(1)
    pairs = [(run, made_up_work(rates, random)) for run in shipped_records()[:20]]
    problem = RatesProblem(pairs, rates.seconds, 1.0, rates.host_block_seconds)
    unchanged, every = np.zeros(len(UNKNOWNS) + 2), np.arange(len(pairs))
    found, updates = problem.predict(unchanged, every), problem.predict_update(unchanged, every)
    for (run, work), seconds, update in zip(pairs, found, updates, strict=True):
        slower = host_factor(run, rates.host_block_seconds)
        micro = micro_step_time(rates, work, host_slower=slower).seconds
        step = micro * run.setup.gradient_accumulation_steps
        step += rates.optimizer_seconds(work, host_slower=slower)
        assert seconds == pytest.approx(step, rel=1e-9), run.id
        assert update == pytest.approx(rates.optimizer_seconds(work, host_slower=slower), rel=1e-9), run.id


def factors_of(gpu: str) -> dict[str, float]:
    """How many times as long as on an H100 each kind of work takes on a card without microbenchmarks."""
    card, reference = gpu_catalog().get(gpu), gpu_catalog().get("h100-80gb")
    rates = known(reference.id)
    scaled = scaled_rates(card, reference, rates)
    assert scaled is not None
    assert scaled.record_ids == rates.record_ids
    return {name: scaled.seconds[name] / rates.seconds[name] for name in NAMES}


def test_a_card_without_microbenchmarks_is_scaled_by_what_is_published() -> None:
    """Matrix work by the rate of large products, traffic by the bandwidth of copies, the host alike."""
    factors = factors_of("rtx-4090")
    assert factors["layer_flop"] == factors["attention_flop"] == pytest.approx(789 / 163)
    assert factors["single_flop"] == pytest.approx(789 / 163)
    assert factors["written_byte"] == pytest.approx(0.893 * 3350 / 921)
    # 128 processors make NF4 weights as fast as an H100's 132 would, but the memory does not take them.
    assert factors["weight_byte"] == pytest.approx(7.52e11 / (921e9 / 2.7))
    assert {factors[kind.name] for kind in WORK_KINDS if kind.side in ("copies", "host")} == {1.0}


def test_a_t4_is_held_back_by_its_power_and_has_no_flash_attention_and_no_tf32() -> None:
    factors = factors_of("t4")
    assert factors["layer_flop"] == pytest.approx(789 / 24)
    assert factors["attention_flop"] == pytest.approx(789 / 24 * 0.65 / 0.33)
    assert factors["masked_attention_flop"] < factors["attention_flop"]
    assert factors["written_byte"] == pytest.approx(0.893 * 3350 / 239.6)
    # 410 TFLOPS by TF32 against 8.1 without, of which between 37 and 100% is left.
    assert 410 / (8.14 * 0.755) < factors["single_flop"] < 410 / (8.14 * 0.755 * 24 / 65)


def test_dequantising_waits_for_processors_where_memory_is_fast() -> None:
    """An A100's 108 make as many NF4 weights less than an H100's 132; its memory would take them."""
    assert factors_of("a100-80gb")["weight_byte"] == pytest.approx(132 / 108)


def test_every_row_has_a_name_of_its_own_and_was_once_in_another_row() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {kind.once_in for kind in WORK_KINDS} - {None} <= set(NAMES)


def test_what_a_rate_scales_with_is_what_microbenchmarks_compare() -> None:
    assert sorted(SCALES) == sorted(field.name for field in dataclasses.fields(Slowdown))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_without_a_rate_is_refused_unless_the_kind_was_told_apart_later(name: str) -> None:
    kind = WORK_KINDS[NAMES.index(name)]
    values = known("h100-80gb").to_dict()
    del values[kind.rate]
    if kind.came_later:
        assert Rates.from_dict(values).seconds[name] == 0.0
    elif kind.once_in is None:
        with pytest.raises(InputError, match=kind.rate):
            Rates.from_dict(values)
    else:
        assert Rates.from_dict(values).seconds[name] == values[f"{kind.once_in}_seconds"]


@pytest.mark.parametrize("value", [-1.0, 11.0, float("nan"), "1", None])
def test_a_rate_that_cannot_be_is_refused_by_name(value: object) -> None:
    values = known("h100-80gb").to_dict() | {"launch_seconds": value}
    with pytest.raises(InputError, match="launch_seconds"):
        Rates.from_dict(values)


@pytest.mark.parametrize("name", ["lanch", "optimizer_byte"])
def test_work_of_a_kind_that_is_not_in_the_table_or_not_counted_there_is_refused(name: str) -> None:
    with pytest.raises(FieldError, match=f"{name}.*launch"):
        ByKind.counted("pass", **{name: 1.0})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"name": ""}, "kind of work"),
        ({"per": "epoch"}, "per"),
        ({"per": "optimizer_step", "side": "copies"}, "side"),
        ({"scales_with": "heat"}, "scales_with"),
        ({"start": 0.0}, "start"),
    ],
)
def test_a_row_that_no_time_is_computed_from_is_refused(changed: dict[str, object], named: str) -> None:
    with pytest.raises(FieldError, match=named):
        dataclasses.replace(WORK_KINDS[0], **changed)  # type: ignore[arg-type]


OPTIM = "adamw_8bit"
TRAINED: dict[str, dict[str, object]] = {
    "qlora": {"method": "qlora"},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "dora": {"method": "qlora", "use_dora": True},
    "targets": {"method": "lora", "target_modules": ["o_proj"]},
}


@pytest.mark.parametrize("knobs", TRAINED.values(), ids=TRAINED)
def test_the_optimizer_steps_over_what_memory_says_is_trained(knobs: dict[str, object]) -> None:
    """Elements and tensors of every catalog model: adapters of experts too, magnitudes, all weights."""
    for name in catalog_ids():
        model = load_shipped(name)
        setup = TrainingSetup.from_dict({"model": name, "max_length": 512, "optim": OPTIM} | knobs)
        trained = TrainingRun(setup=setup, model=model).trained
        step = step_work(TrainingRun(setup=setup, model=model)).optimizer_step
        assert step["optimizer_8bit_byte"] / OPTIMIZER[OPTIM] == trained.elements, name
        tensors = sum(tensor.count for tensor in trained.tensors)
        assert step["optimizer_call"] / OPTIMIZER_CALLS.get(OPTIM, 1.0) == tensors, name


@pytest.mark.parametrize(
    ("targets", "tensors", "millions"),
    [("all-linear", 672, 996.5), (["q_proj", "k_proj", "v_proj", "o_proj"], 384, 13.4)],
    ids=["all-linear", "attention"],
)
def test_what_is_trained_of_a_mixture_is_its_experts_above_all(
    targets: str | list[str], tensors: int, millions: float
) -> None:
    setup = TrainingSetup.from_dict(
        {"model": "qwen3-30b-a3b", "max_length": 512, "optim": OPTIM, "target_modules": targets}
    )
    step = step_work(TrainingRun(setup=setup, model=load_shipped(setup.model))).optimizer_step
    assert step["optimizer_call"] == tensors
    assert round(step["optimizer_8bit_byte"] / OPTIMIZER[OPTIM] / 1e6, 1) == millions
