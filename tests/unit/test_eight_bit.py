"""8-bit products in a plan: asked for or allowed, refused where they cannot run, and what they cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.base.errors import InputError
from planner.calibration.records import read_records
from planner.gpus.catalog import gpu_catalog
from planner.memory import estimate_memory
from planner.models.catalog import resolve_model
from planner.planning.make_plan import make_plan
from planner.setup.request import PlanRequest
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.text.plan import LEARNING, setup_lines
from planner.text.short import _train_command
from planner.throughput.eight_bit import eight_bit_products
from planner.throughput.roofline import estimate_step

ROOT = Path(__file__).resolve().parents[2]
MODEL = "llama-3.2-1b"


def setup(base_matmul: str, **knobs: object) -> TrainingSetup:
    wanted = {"model": MODEL, "max_length": 2048, "compile": "regional", "gradient_checkpointing": False}
    return TrainingSetup(**{**wanted, "base_matmul": base_matmul, **knobs})


def run(base_matmul: str, **knobs: object) -> TrainingRun:
    made = setup(base_matmul, **knobs)
    return TrainingRun(setup=made, model=resolve_model(made.model))


def test_they_are_chosen_where_allowed_alone_and_told_with_their_price() -> None:
    knobs = (("max_length", 2048),)
    usual = make_plan(PlanRequest(model=MODEL, gpu="rtx-4090", knobs=knobs))
    assert usual.setup.base_matmul == "bf16"
    assert "learning" not in dict(setup_lines(usual))
    allowed = make_plan(PlanRequest(model=MODEL, gpu="rtx-4090", knobs=knobs, allow_8bit=True))
    assert (allowed.setup.base_matmul, allowed.setup.compile) == ("fp8", "regional")
    assert allowed.speed is not None
    assert usual.speed is not None
    assert allowed.speed.tokens_per_second > 1.05 * usual.speed.tokens_per_second
    assert dict(setup_lines(allowed))["learning"] == LEARNING["fp8"]
    assert "--allow-8bit" in _train_command(allowed)
    below = make_plan(PlanRequest(model=MODEL, gpu="rtx-3090", knobs=knobs, allow_8bit=True))
    assert below.setup.base_matmul == "bf16"


def test_asked_for_they_bring_compiled_layers_and_are_refused_where_they_cannot_run() -> None:
    asked = PlanRequest(
        model=MODEL, gpu="rtx-4090", knobs=(("max_length", 2048), ("base_matmul", "fp8_backward"))
    )
    assert make_plan(asked).setup.compile == "regional"
    with pytest.raises(
        InputError, match=r"base_matmul=fp8 needs compute capability 8\.9 .* rtx-3090 has 8\.6"
    ):
        make_plan(PlanRequest(model=MODEL, gpu="rtx-3090", knobs=(("base_matmul", "fp8"),)))
    for knobs, told in (
        ({"compile": "none"}, "base_matmul fp8 needs compile regional"),
        ({"dtype": "float16"}, "base_matmul fp8 needs dtype bfloat16"),
        ({"method": "full"}, "base_matmul applies to qlora and lora"),
        ({"num_processes": 2, "distributed": "fsdp"}, "base_matmul fp8 needs one GPU or distributed ddp"),
    ):
        with pytest.raises(InputError, match=told):
            setup("fp8", **knobs)


def test_a_setup_written_before_them_reads_as_16_bit_products() -> None:
    values = setup("bf16").to_dict()
    del values["base_matmul"]
    assert TrainingSetup.from_dict(values) == setup("bf16")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gradient_that_is_made_anew_takes_one_or_two_tensors_of_the_mlp(checkpointed: bool) -> None:
    """As measured: 28,672 and 57,344 bytes a token of Llama-3.1-8B (benchmarks/results/eight_bit.json)."""
    gpu = gpu_catalog().get("h200")
    knobs = {
        "model": "llama-3.1-8b",
        "optim": "adamw_8bit",
        "per_device_train_batch_size": 2 if checkpointed else 8,
        "gradient_checkpointing": checkpointed,
    }
    usual, narrow = (
        estimate_memory(run(kind, **knobs), gpu=gpu, replay=True).allocated_bytes
        for kind in ("bf16", "fp8_backward")
    )
    tokens = 2048 * (2 if checkpointed else 8)
    assert narrow - usual == pytest.approx((2 if checkpointed else 1) * 2 * 14336 * tokens, rel=0.03)


def test_time_saved_is_that_of_the_passes_in_8_bits() -> None:
    gpu = gpu_catalog().get("h200")
    rates = {
        kind: estimate_step(run(kind, per_device_train_batch_size=16), gpu)
        for kind in ("bf16", "fp8_backward", "fp8")
    }
    usual, gradients, both = (rates[kind].tokens_per_second for kind in ("bf16", "fp8_backward", "fp8"))
    assert usual < gradients < both < rates["fp8"].roofline_tokens_per_second
    forward, backward = eight_bit_products(run("fp8").kind)
    layers = resolve_model(MODEL).num_hidden_layers
    assert backward.products == 7 * layers
    assert forward.products == 7 * (layers - 4)
    again = eight_bit_products(run("fp8", gradient_checkpointing=True).kind)[1]
    assert again.products == 7 * layers + 7 * (layers - 4)


def test_measured_runs_needed_what_is_counted_and_ran_as_forecast_beside_16_bits() -> None:
    """Bars: memory within 1%; of speed what the same setup in 16 bits is off by, and a tenth."""
    records = list(read_records(ROOT / "profiles" / "runs" / "eight_bit" / "h200.jsonl"))
    gpu = gpu_catalog().get("h200")
    off = {}
    for record in records:
        made = TrainingRun(setup=record.setup, model=resolve_model(record.setup.model))
        found = estimate_memory(made, gpu=gpu, replay=True, allocator=record.allocator)
        step = next(phase for phase in record.phases if phase.name == "step")
        assert found.allocated_bytes == pytest.approx(step.allocated_bytes, rel=0.001)
        assert found.reserved_bytes == pytest.approx(step.reserved_bytes, rel=0.01)
        assert step.process_bytes is not None
        assert found.process_bytes == pytest.approx(step.process_bytes, rel=0.01)
        assert record.tokens_per_second is not None
        forecast = estimate_step(made, gpu).tokens_per_second
        off[record.setup.replace(base_matmul="bf16"), record.setup.base_matmul] = (
            forecast / record.tokens_per_second
        )
    both = [made for made, kind in off if kind == "fp8" and (made, "bf16") in off]
    assert len(both) == 1
    assert off[both[0], "fp8"] == pytest.approx(off[both[0], "bf16"], rel=0.1)
