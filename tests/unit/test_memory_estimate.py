"""Properties of estimate_memory that hold for every model and setup, and the contract's figures."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.base.errors import FieldError, InputError, NotModelledError
from planner.gpus.catalog import gpu_catalog
from planner.memory import MemoryBreakdown, estimate_memory
from planner.memory.held.optimizer import MOMENTS
from planner.models.catalog import load_shipped
from planner.setup.adapters import UNCOMMON_OPTIMIZERS
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import OPTIMIZERS, TrainingSetup
from tests.unit.families import DENSE

GIB = 2**30
H100 = gpu_catalog().get("h100-80gb")
EAGER = ("gemma-2-2b",)
EXPERTS = ("qwen3-30b-a3b",)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def setups(draw: st.DrawFn) -> TrainingSetup:
    method = draw(st.sampled_from(("qlora", "lora", "full")))
    model = draw(st.sampled_from((*DENSE, *EAGER, *EXPERTS) if method != "full" else (*DENSE, *EAGER)))
    values: dict[str, Any] = {
        "model": model,
        "method": method,
        "max_length": draw(st.integers(2, 4096)),
        "per_device_train_batch_size": draw(st.integers(1, 16)),
        "gradient_accumulation_steps": draw(st.sampled_from((1, 4))),
        "gradient_checkpointing": draw(st.booleans()),
        "optim": draw(st.sampled_from([name for name in OPTIMIZERS if name not in UNCOMMON_OPTIMIZERS])),
        "dtype": draw(st.sampled_from(("bfloat16", "float32"))),
    }
    if method != "full":
        values["lora_r"] = draw(st.integers(1, 256))
        values["lora_dropout"] = draw(st.sampled_from((0.0, 0.05)))
    if values["gradient_checkpointing"]:
        values["checkpointed_layers"] = draw(st.sampled_from((None, 0, 7)))
    return TrainingSetup(**values)


def estimate(setup: TrainingSetup, *, padded: bool = False) -> MemoryBreakdown:
    return estimate_memory(TrainingRun(setup=setup, model=load_shipped(setup.model), padded=padded), gpu=H100)


def sized(model: str, **knobs: Any) -> MemoryBreakdown:
    return estimate(TrainingSetup(**{"model": model, "max_length": 1024, **knobs}))


@QUICK
@given(setup=setups(), padded=st.booleans())
def test_parts_sum_and_phases_are_sane(setup: TrainingSetup, padded: bool) -> None:
    found = estimate(setup, padded=padded)
    assert sum(component.size_bytes for component in found.components) == found.process_bytes
    assert all(component.size_bytes >= 0 for component in found.components)
    assert [phase.name for phase in found.phases] == ["load", "step", "evaluation", "save"]
    for phase in found.phases:
        assert 0 < phase.allocated_bytes <= phase.reserved_bytes <= phase.process_bytes
        assert phase.process_bytes <= phase.process_upper_bytes
    assert found.weights_bytes <= found.allocated_bytes
    assert found.peak_bytes <= found.peak_upper_bytes
    assert found.fits(found.peak_upper_bytes)
    assert not found.fits(found.peak_upper_bytes - 1)


@QUICK
@given(setup=setups())
def test_more_of_anything_never_needs_less(setup: TrainingSetup) -> None:
    changes: list[dict[str, Any]] = [
        {"per_device_train_batch_size": setup.per_device_train_batch_size + 1},
        {"max_length": setup.max_length * 2},
    ]
    if setup.method != "full" and setup.optim not in MOMENTS:
        # bitsandbytes holds larger tensors in 8 bits, or outside the allocator: a higher rank can take less.
        changes.append({"lora_r": setup.lora_r + 8})
    before = estimate(setup)
    for change in changes:
        after = estimate(setup.replace(**change))
        assert after.allocated_bytes >= before.allocated_bytes, change
        assert after.process_upper_bytes >= before.process_upper_bytes, change


@QUICK
@given(setup=setups())
def test_checkpointing_never_needs_more(setup: TrainingSetup) -> None:
    kept = estimate(setup.replace(gradient_checkpointing=False, checkpointed_layers=None))
    checkpointed = estimate(setup.replace(gradient_checkpointing=True, checkpointed_layers=None))
    # A recomputed layer runs beside the stream's gradient and a checkpoint, which short sequences notice.
    assert checkpointed.allocated_bytes <= kept.allocated_bytes * 1.02


@pytest.mark.parametrize("model", [*DENSE, *EAGER, *EXPERTS])
def test_quantised_weights_are_smaller_and_constants_smaller_nested(model: str) -> None:
    plain, nested = sized(model, method="lora"), sized(model)
    single = sized(model, bnb_4bit_use_double_quant=False)
    assert nested.weights_bytes < single.weights_bytes < plain.weights_bytes
    assert sized(model, dtype="float32").weights_bytes > nested.weights_bytes


@pytest.mark.parametrize("model", DENSE)
def test_dropout_costs_memory_and_padding_costs_masks(model: str) -> None:
    setup = TrainingSetup(model=model, max_length=2048, per_device_train_batch_size=4)
    assert estimate(setup.replace(lora_dropout=0.05)).allocated_bytes > estimate(setup).allocated_bytes
    if model != "phi-4-mini":  # a mask saves it the copy that lays flash attention's output out anew
        assert estimate(setup, padded=True).allocated_bytes > estimate(setup).allocated_bytes


def test_a_frozen_part_of_the_model_is_cheaper() -> None:
    few = sized("llama-3.2-1b", target_modules=["q_proj", "v_proj"])
    assert few.allocated_bytes < sized("llama-3.2-1b").allocated_bytes
    names = {c.name: c.size_bytes for c in few.components}
    assert 0 < names["adapter"] < 10 * 2**20


@pytest.mark.parametrize("layers", [0, 5, 16])
def test_fewer_checkpointed_layers_need_more(layers: int) -> None:
    model = load_shipped("llama-3.2-1b")
    setup = TrainingSetup(
        model="llama-3.2-1b", max_length=2048, per_device_train_batch_size=4, checkpointed_layers=layers
    )
    found = estimate(setup).allocated_bytes
    none = estimate(setup.replace(gradient_checkpointing=False, checkpointed_layers=None)).allocated_bytes
    every = estimate(setup.replace(checkpointed_layers=None)).allocated_bytes
    assert every <= found <= none
    assert (found == every) == (layers == model.num_hidden_layers)


@pytest.mark.parametrize(
    ("field", "knobs"),
    [
        ("compile=regional with use_dora", {"compile": "regional", "use_dora": True}),
        ("compile=regional with dtype", {"compile": "regional", "dtype": "float32"}),
    ],
)
def test_a_knob_without_a_model_is_refused_by_name(field: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(NotModelledError, match=field) as caught:
        sized("llama-3.2-1b", **knobs)
    assert caught.value.field == field


def test_what_the_model_cannot_do_is_refused() -> None:
    with pytest.raises(FieldError, match="checkpointed_layers"):
        sized("llama-3.2-1b", checkpointed_layers=17)
    with pytest.raises(FieldError, match="eager"):
        sized("gemma-2-2b", attn_implementation="sdpa")
    with pytest.raises(FieldError, match="q_porj"):
        sized("llama-3.2-1b", target_modules=["q_porj"])
    with pytest.raises(InputError, match="up_proj"):
        sized("qwen3-30b-a3b", target_modules=["gate_proj", "down_proj"])
    with pytest.raises(InputError, match="down_proj"):
        sized("qwen3-30b-a3b", target_modules=["gate_proj", "up_proj"])


@pytest.mark.parametrize(("allocator", "weights_gib"), [(NATIVE, 9.327), (EXPANDABLE, 9.250)])
def test_the_contracts_figures(allocator: str, weights_gib: float) -> None:
    """Qwen2.5-14B, QLoRA r16 on all linears, 4,096 tokens, micro-batch 1, sdpa, paged_adamw_8bit, an H100.

    Expandable segments hold the tensors alone, torch's default the unsplit rests of its segments too.
    """
    setup = TrainingSetup(model="qwen2.5-14b", max_length=4096, attn_implementation="sdpa")
    found = estimate_memory(
        TrainingRun(setup=setup, model=load_shipped(setup.model)), gpu=H100, allocator=allocator
    )
    assert found.weights_bytes / GIB == pytest.approx(weights_gib, rel=0.0005)
    assert found.allocated_bytes / GIB == pytest.approx(12.52, rel=0.01)


def test_experts_are_counted_in_16_bits() -> None:
    """bitsandbytes leaves 3-D experts alone: a 30-billion-parameter model in "4 bits" weighs over 54 GiB."""
    assert sized("qwen3-30b-a3b", target_modules=["q_proj"]).weights_bytes > 54 * GIB


def test_components_name_themselves_once() -> None:
    found = sized("llama-3.2-1b")
    names = [component.name for component in found.components]
    assert len(set(names)) == len(names)
    assert all(component.title and component.origin for component in found.components)
    assert found.peak_phase.name in {"step", "evaluation"}
    assert MemoryBreakdown.__name__ == "MemoryBreakdown"
    assert found.to_dict()["weights_bytes"] == found.weights_bytes


def test_components_that_do_not_sum_are_refused() -> None:
    import dataclasses

    found = sized("llama-3.2-1b")
    with pytest.raises(InputError, match="sum to"):
        dataclasses.replace(found, process_bytes=found.process_bytes + 1)
