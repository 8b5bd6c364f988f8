"""Properties of every memory knob: what it costs beside not having it, how it grows, and that parts sum."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.base.errors import InputError, NotModelledError
from planner.gpus.catalog import gpu_catalog
from planner.memory import MemoryBreakdown, estimate_memory
from planner.memory.decoder import groups
from planner.memory.refusals import refuse_unmodelled
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import ALLOCATORS, EXPANDABLE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from tests.unit.families import DENSE as MODELS

H100 = gpu_catalog().get("h100-80gb")
KNOBS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.05},
    "k-bit": {"prepare_for_kbit_training": True},
    "liger": {"kernels": "liger"},
    "selective": {"selective_checkpointing": True},
    "offloading": {"activation_offloading": True},
    "packing": {"packing": True},
    "flex": {"attn_implementation": "flex_attention"},
    "flex and packing": {"attn_implementation": "flex_attention", "packing": True},
    "eager": {"attn_implementation": "eager"},
    "fp32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "dora and k-bit": {"use_dora": True, "prepare_for_kbit_training": True},
    "liger and selective": {"kernels": "liger", "selective_checkpointing": True},
    "nothing checkpointed": {"gradient_checkpointing": False},
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "single tokens": {"trainable_token_indices": [3, 5]},
}
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_setup(model: str, **knobs: Any) -> TrainingSetup:
    fixed = {"model": model, "max_length": 1024, "per_device_train_batch_size": 4}
    return TrainingSetup(**{**fixed, **knobs})


def estimate(
    setup: TrainingSetup, *, replay: bool = False, padded: bool = False, allocator: str = EXPANDABLE
) -> MemoryBreakdown:
    return estimate_memory(
        TrainingRun(setup=setup, model=load_shipped(setup.model), padded=padded),
        gpu=H100,
        replay=replay,
        allocator=allocator,
    )


def allocated(model: str, **knobs: Any) -> int:
    return estimate(make_setup(model, **knobs)).allocated_bytes


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS.keys())
@pytest.mark.parametrize("replay", [False, True], ids=["counted", "replayed"])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_parts_sum_to_totals(knobs: dict[str, Any], replay: bool, allocator: str) -> None:
    for model in ("llama-3.2-1b", "gemma-3-1b"):
        found = estimate(make_setup(model, **knobs), replay=replay, allocator=allocator)
        assert sum(part.size_bytes for part in found.components) == found.process_bytes
        assert all(part.size_bytes >= 0 for part in found.components)
        for phase in found.phases:
            assert 0 < phase.allocated_bytes <= phase.reserved_bytes <= phase.process_bytes
            assert phase.process_bytes <= phase.process_upper_bytes


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS.keys())
def test_estimates_of_a_setup_and_of_its_json_are_the_same(knobs: dict[str, Any]) -> None:
    setup = make_setup("llama-3.2-1b", **knobs)
    again = TrainingSetup.from_dict(json.loads(json.dumps(setup.to_dict())))
    assert again == setup
    assert estimate(again).to_dict() == estimate(setup).to_dict()


@QUICK
@given(
    model=st.sampled_from(MODELS),
    knobs=st.sampled_from([knobs for name, knobs in KNOBS.items() if name != "eager"]),
    length=st.integers(64, 4096),
    batch=st.integers(1, 8),
    rank=st.integers(1, 128),
)
def test_more_of_anything_never_needs_less(
    model: str, knobs: dict[str, Any], length: int, batch: int, rank: int
) -> None:
    setup = make_setup(model, **knobs).replace(
        max_length=length, per_device_train_batch_size=batch, lora_r=rank, optim="sgd"
    )
    before = estimate(setup).allocated_bytes
    for change in (
        {"max_length": 2 * length},
        {"per_device_train_batch_size": batch + 1},
        {"lora_r": rank + 8},
    ):
        assert estimate(setup.replace(**change)).allocated_bytes >= before, change


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kept", [{}, {"gradient_checkpointing": False}], ids=["checkpointed", "kept"])
def test_dora_costs_more_than_lora(model: str, kept: dict[str, Any]) -> None:
    for method in ("qlora", "lora"):
        plain = allocated(model, method=method, **kept)
        dora = allocated(model, method=method, use_dora=True, **kept)
        dropped = allocated(model, method=method, use_dora=True, lora_dropout=0.05, **kept)
        assert plain < min(dora, dropped)
        # Kept layers hold the base's fp32 output without dropout, a 16-bit second one with it.
        assert dora < dropped or kept
    names = {part.name: part.size_bytes for part in estimate(make_setup(model, use_dora=True)).components}
    without = {part.name: part.size_bytes for part in estimate(make_setup(model)).components}
    # A magnitude of four bytes an output.
    assert names["adapter"] > without["adapter"]


@pytest.mark.parametrize("model", MODELS)
def test_selective_checkpointing_lies_between_checkpoints_and_none(model: str) -> None:
    every = allocated(model)
    selective = allocated(model, selective_checkpointing=True)
    none = allocated(model, gradient_checkpointing=False)
    assert every < selective < none


def test_selective_checkpointing_keeps_nothing_of_attention_it_does_not_know() -> None:
    """Its policy names the kernels of torch's sdpa and of flash-attn, not flex attention's nor eager's.

    One after the other, from nothing remembered: layers that run the same kernels are replayed once.
    """
    groups.groups_of.cache_clear()
    for attention in ("flex_attention", "eager"):
        plain = make_setup("llama-3.2-1b", attn_implementation=attention)
        assert (
            estimate(plain.replace(selective_checkpointing=True)).allocated_bytes
            == estimate(plain).allocated_bytes
        )
    sdpa = make_setup("llama-3.2-1b", attn_implementation="sdpa", max_length=4096)
    assert (
        estimate(sdpa.replace(selective_checkpointing=True)).allocated_bytes > estimate(sdpa).allocated_bytes
    )


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-14b", "llama-3.3-70b"])
def test_offloading_needs_less_than_checkpointing(model: str) -> None:
    setup = make_setup(model)
    assert (
        estimate(setup.replace(activation_offloading=True)).allocated_bytes < estimate(setup).allocated_bytes
    )
    deep = setup.replace(max_length=4096)
    saved = (
        estimate(deep).allocated_bytes - estimate(deep.replace(activation_offloading=True)).allocated_bytes
    )
    spec = load_shipped(model)
    checkpoint = deep.tokens_per_micro_step * spec.hidden_size * 2
    # All but the few checkpoints that are on their way.
    assert saved > 0.7 * spec.num_hidden_layers * checkpoint


@pytest.mark.parametrize("model", MODELS)
def test_kbit_preparation_costs_more_than_leaving_it(model: str) -> None:
    plain, prepared = make_setup(model), make_setup(model, prepare_for_kbit_training=True)
    assert estimate(prepared).allocated_bytes > estimate(plain).allocated_bytes
    assert estimate(prepared).weights_bytes == estimate(plain).weights_bytes  # as they are loaded


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kept", [{}, {"gradient_checkpointing": False}], ids=["checkpointed", "kept"])
def test_liger_needs_no_more(model: str, kept: dict[str, Any]) -> None:
    liger, plain = allocated(model, kernels="liger", **kept), allocated(model, **kept)
    assert liger < plain


def packed(model: str, attention: str, length: int) -> int:
    setup = make_setup(model, attn_implementation=attention, packing=True, max_length=length)
    return estimate(
        setup.replace(per_device_train_batch_size=8, gradient_checkpointing=False)
    ).allocated_bytes


def test_packing_with_sdpa_grows_with_the_square_of_the_tokens() -> None:
    """sdpa gets a mask over the flattened batch; flex attention gets none."""

    def bend(attention: str) -> float:
        one, two, three = (packed("llama-3.2-1b", attention, length) for length in (2048, 4096, 6144))
        return ((three - two) - (two - one)) / 2**20

    assert abs(bend("flex_attention")) < 2
    tokens = 8 * 2048
    # Second difference of c * tokens^2: each kept layer's additive 16-bit mask, and the boolean one.
    layers = load_shipped("llama-3.2-1b").num_hidden_layers
    assert bend("sdpa") == pytest.approx(2 * tokens**2 * (2 * layers + 1) / 2**20, rel=0.02)


def test_packing_masks_the_whole_batch_and_padding_each_row() -> None:
    setup = make_setup("llama-3.2-1b", per_device_train_batch_size=8, max_length=2048)
    padded = estimate(setup, padded=True).allocated_bytes
    assert estimate(setup).allocated_bytes < padded
    assert padded < estimate(setup.replace(packing=True)).allocated_bytes


@pytest.mark.parametrize("model", MODELS)
def test_fp32_needs_more_and_float16_what_fp32_adapters_add(model: str) -> None:
    plain = allocated(model)
    assert plain < allocated(model, dtype="float16") < allocated(model, dtype="float32")


@pytest.mark.parametrize(
    ("field", "knobs"),
    [
        ("compile=regional with kernels", {"kernels": "liger"}),
        ("compile=regional with use_dora", {"use_dora": True}),
        (
            "compile=regional, layers not checkpointed and activation_offloading",
            {"activation_offloading": True, "gradient_checkpointing": False},
        ),
        ("compile=regional with prepare_for_kbit_training", {"prepare_for_kbit_training": True}),
        ("compile=regional with dtype", {"dtype": "float32"}),
        ("compile=regional with attn_implementation", {"attn_implementation": "eager"}),
    ],
)
def test_a_compiled_combination_that_was_not_measured_is_refused_by_name(
    field: str, knobs: dict[str, Any]
) -> None:
    with pytest.raises(NotModelledError) as caught:
        allocated("llama-3.2-1b", compile="regional", **knobs)
    assert caught.value.field == field
    assert allocated("llama-3.2-1b", **knobs) > 0


@pytest.mark.parametrize(
    ("model", "knobs", "named"),
    [
        ("llama-3.2-1b", {"modules_to_save": ["norm"]}, "expected embed_tokens, lm_head"),
        ("llama-3.2-1b", {"bias": "all", "method": "lora"}, "no such biases"),
        (
            "llama-3.2-1b",
            {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]},
            "modules_to_save trains the whole embedding",
        ),
        (
            "llama-3.1-8b",
            {"modules_to_save": ["lm_head"], "compile": "regional"},
            "save with comp",
        ),
        (
            "llama-3.1-8b",
            {"trainable_token_indices": [1], "dtype": "float16"},
            "indices with dtype='float16'",
        ),
    ],
)
def test_what_cannot_be_trained_beside_an_adapter_is_refused_by_name(
    model: str, knobs: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        allocated(model, **knobs)


def test_liger_is_refused_where_its_kernels_are_others_or_none() -> None:
    with pytest.raises(NotModelledError, match="kernels=liger with experts of model"):
        allocated("mixtral-8x7b", kernels="liger")
    unknown = replace(load_shipped("llama-3.2-1b"), model_type="arcee")
    setup = make_setup("llama-3.2-1b", kernels="liger")
    with pytest.raises(InputError, match=r"model_type arcee\); use kernels none"):
        refuse_unmodelled(TrainingRun(setup=setup, model=unknown))
    refuse_unmodelled(TrainingRun(setup=setup.replace(kernels="none"), model=unknown))


def test_kbit_preparation_without_quantisation_is_refused() -> None:
    with pytest.raises(InputError, match="prepare_for_kbit_training"):
        make_setup("llama-3.2-1b", method="lora", prepare_for_kbit_training=True)
