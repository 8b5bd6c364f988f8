"""Memory of compiled decoder layers: what they keep, what a budget leaves them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from planner.base.errors import FieldError, InputError, NotModelledError
from planner.memory import MemoryBreakdown, estimate_memory
from planner.memory.decoder.groups import LayerGroup, layer_groups
from planner.memory.step.replay import StepReplay
from planner.memory.step.replayed import CudaSizes
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from tests.unit.families import DENSE

NO_CHECKPOINT: dict[str, Any] = {"gradient_checkpointing": False}
OFFLOADED: dict[str, Any] = {"activation_offloading": True}
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointed_layers": 3},
    {"selective_checkpointing": True},
    NO_CHECKPOINT,
    {**NO_CHECKPOINT, "activation_memory_budget": 0.4},
)


def setup_of(model: str, **knobs: Any) -> TrainingSetup:
    return TrainingSetup(**{"model": model, "max_length": 2048, "compile": "regional", **knobs})


def estimated(model: str, **knobs: Any) -> MemoryBreakdown:
    return estimate_memory(
        TrainingRun(setup=setup_of(model, **knobs), model=load_shipped(model)), allocator=EXPANDABLE
    )


def parts_of(model: str, **knobs: Any) -> tuple[LayerGroup, ...]:
    setup, spec = setup_of(model, **knobs), load_shipped(model)
    found, _ = layer_groups(TrainingRun(setup=setup, model=spec, padded=False))
    return found


def kept_per_token(part: LayerGroup) -> float:
    return sum(size.per_token for size in part.memory.saved)


def test_a_llama_layer_keeps_what_its_gradients_read() -> None:
    """Input, sum after attention, rotated queries and keys, values, attention's output, gate and up."""
    layer = load_shipped("llama-3.2-1b").layers[0]
    hidden, query, key = layer.hidden_size, layer.query_size, layer.key_value_size
    wide = 2 * (2 * hidden + 2 * query + 2 * key + 2 * layer.intermediate_size)
    narrow = 4 * layer.num_attention_heads + 2 * 4 + 7 * 2 * 16
    later = next(part for part in parts_of("llama-3.2-1b", **NO_CHECKPOINT) if 0 not in part.indices)
    assert kept_per_token(later) == wide + narrow


@pytest.mark.parametrize("model", DENSE)
def test_a_compiled_checkpoint_keeps_the_input_alone(model: str) -> None:
    for part in parts_of(model):
        assert kept_per_token(part) == 2 * part.layer.hidden_size
        assert part.memory.keeps_input
    for part in parts_of(model, selective_checkpointing=True):
        layer = part.layer
        attention = 2 * layer.query_size + 4 * layer.num_attention_heads
        assert kept_per_token(part) == 2 * layer.hidden_size + attention


@pytest.mark.parametrize("model", DENSE)
def test_compiled_layers_keep_less_than_uncompiled_ones(model: str) -> None:
    for knobs in ({}, {"lora_dropout": 0.05}, {"method": "lora"}, {"method": "full"}):
        compiled = estimated(model, **NO_CHECKPOINT, **knobs)
        eager = estimated(model, **NO_CHECKPOINT, **knobs, compile="none")
        assert compiled.allocated_bytes < eager.allocated_bytes
        assert estimated(model, **knobs).allocated_bytes <= compiled.allocated_bytes


@pytest.mark.parametrize("model", DENSE)
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_budget_is_kept_and_more_of_it_keeps_more(model: str, method: str) -> None:
    budgets = (0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 1.0)
    kept = []
    for budget in budgets:
        parts = parts_of(model, method=method, **NO_CHECKPOINT, activation_memory_budget=budget)
        part = parts[-1]
        kept.append(kept_per_token(part) - 2 * part.layer.hidden_size)
    assert kept[0] == 0
    assert kept == sorted(kept)
    if not part.layer.fused_qkv:
        assert all(size <= budget * kept[-1] * 1.001 for size, budget in zip(kept, budgets, strict=True))
    without = parts_of(model, method=method, **NO_CHECKPOINT)[-1]
    assert kept[-1] == kept_per_token(without) - 2 * part.layer.hidden_size


@pytest.mark.parametrize(("allocator", "tolerance"), [(NATIVE, 0.03), (EXPANDABLE, 0.0001)])
@pytest.mark.parametrize("knobs", WAYS, ids=lambda knobs: "-".join(knobs) or "checkpointed")
@pytest.mark.parametrize("model", DENSE)
def test_the_allocators_replay_agrees_with_the_count(
    model: str, knobs: dict[str, Any], allocator: str, tolerance: float
) -> None:
    """But for what the default's cached blocks are larger than what was asked for: up to 1 MiB, much in small
    models.
    """
    for packing in (False, True):
        setup, spec = setup_of(model, max_length=1024, packing=packing, **knobs), load_shipped(model)
        counted = estimate_memory(TrainingRun(setup=setup, model=spec), allocator=allocator).allocated_bytes
        replay = StepReplay(TrainingRun(setup=setup, model=spec), CudaSizes.of(None), allocator)
        replayed = replay.play().step_allocated_bytes
        assert replayed == pytest.approx(counted, rel=tolerance)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-14b"])
@pytest.mark.parametrize("allocator", [NATIVE, EXPANDABLE])
def test_offloading_leaves_of_the_checkpoints_only_those_on_their_way(model: str, allocator: str) -> None:
    setup, spec = setup_of(model, max_length=4096, per_device_train_batch_size=4), load_shipped(model)
    offloaded = setup.replace(**OFFLOADED)
    checkpoints = spec.num_hidden_layers * setup.tokens_per_micro_step * spec.hidden_size * 2
    for replay in (False, True):
        kept, left = (
            estimate_memory(
                TrainingRun(setup=one, model=spec), replay=replay, allocator=allocator
            ).allocated_bytes
            for one in (setup, offloaded)
        )
        assert 0.7 * checkpoints < kept - left < checkpoints


def test_more_tokens_need_more() -> None:
    for knobs in WAYS:
        sizes = [
            estimated("qwen3-0.6b", **{**knobs, "max_length": n}).allocated_bytes for n in (512, 1024, 4096)
        ]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("gate_proj", "o_proj")])
def test_adapters_on_some_layers_alone_need_less(targets: tuple[str, ...]) -> None:
    for knobs in WAYS:
        some = estimated("llama-3.2-1b", target_modules=targets, **knobs).allocated_bytes
        assert some <= estimated("llama-3.2-1b", **knobs).allocated_bytes


def test_accumulated_gradients_of_a_graph_are_there_at_once() -> None:
    once = estimated("llama-3.2-1b", method="full")
    again = estimated("llama-3.2-1b", method="full", gradient_accumulation_steps=4)
    assert again.allocated_bytes > once.allocated_bytes


@pytest.mark.parametrize(
    ("model", "knob", "knobs"),
    [
        ("llama-3.2-1b", "kernels", {"kernels": "liger"}),
        ("llama-3.2-1b", "use_dora", {"use_dora": True}),
        ("llama-3.2-1b", "activation_offloading", {**OFFLOADED, **NO_CHECKPOINT}),
        ("llama-3.2-1b", "activation_offloading", {**OFFLOADED, "selective_checkpointing": True}),
        ("llama-3.2-1b", "activation_offloading", {**OFFLOADED, "checkpointed_layers": 3}),
        ("llama-3.2-1b", "prepare_for_kbit_training", {"prepare_for_kbit_training": True}),
        ("llama-3.2-1b", "dtype", {"dtype": "float32"}),
        ("llama-3.2-1b", "attn_implementation", {"attn_implementation": "eager"}),
        ("gemma-2-2b", "attn_implementation", {}),
        ("qwen3-30b-a3b", "experts", {}),
        (
            "llama-3.2-1b",
            "lora_dropout",
            {**NO_CHECKPOINT, "activation_memory_budget": 0.5, "lora_dropout": 0.05},
        ),
    ],
)
def test_what_has_not_been_measured_compiled_is_refused_by_name(
    model: str, knob: str, knobs: dict[str, Any]
) -> None:
    with pytest.raises((NotModelledError, FieldError, InputError), match=knob):
        estimated(model, **knobs)
