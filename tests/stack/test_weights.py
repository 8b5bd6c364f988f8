"""Bytes of the loaded weights: the memory model against what bitsandbytes and transformers hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest

pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb

from planner.memory.allocators.native import rounded
from planner.memory.held.weights import WeightMemory, loaded_weights
from planner.models.spec import ModelSpec
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

from .live_bytes import constants_of
from .small_models import FAMILIES, load_model, spec_of


def loaded(setup: TrainingSetup, spec: ModelSpec, allocator: str) -> WeightMemory:
    run = TrainingRun(setup=setup, model=spec)
    return loaded_weights(spec, run.storage, allocator).memory


def make_setup(family: str, **knobs: Any) -> TrainingSetup:
    return TrainingSetup(**{"model": family, "max_length": 64, **knobs})


def nbytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("family", "knobs"),
    [
        *((family, {}) for family in FAMILIES),
        *((family, {"bnb_4bit_use_double_quant": False}) for family in ("llama", "qwen3_moe")),
        ("llama", {"bnb_4bit_quant_type": "fp4"}),
        ("llama", {"dtype": "float32"}),
    ],
)
def test_quantised_model(family: str, knobs: dict[str, Any]) -> None:
    setup = make_setup(family, **knobs)
    model = load_model(family, setup)
    expected = loaded(setup, spec_of(family), EXPANDABLE)
    quantised = [p for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)]
    assert quantised
    assert expected.quantized_bytes == nbytes(quantised)
    assert expected.constants_bytes == sum(nbytes(constants_of(p.quant_state)) for p in quantised)
    rest = [p for p in model.parameters() if not isinstance(p, bnb.nn.Params4bit)]
    assert expected.unquantized_bytes == nbytes(rest)
    assert expected.largest_bytes == max(
        [p.quant_state.shape.numel() * rest[0].element_size() for p in quantised]
        + [p.numel() * p.element_size() for p in rest]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_what_the_allocators_hand_out(family: str, method: str) -> None:
    """Every tensor rounded up in expandable segments; the default adds unsplit rests, and counts the same."""
    setup = make_setup(family, method=method)
    expandable, native = (loaded(setup, spec_of(family), name) for name in (EXPANDABLE, NATIVE))
    tensors = []
    for parameter in load_model(family, setup).parameters():
        tensors.append(parameter)
        if isinstance(parameter, bnb.nn.Params4bit):
            tensors += constants_of(parameter.quant_state)
    assert expandable.allocated_bytes == sum(rounded(nbytes([tensor])) for tensor in tensors)
    assert expandable.allocated_bytes <= native.allocated_bytes
    assert dataclasses.replace(native, allocated_bytes=0) == dataclasses.replace(
        expandable, allocated_bytes=0
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_unquantised_model(family: str, method: str) -> None:
    setup = make_setup(family, method=method)
    expected = loaded(setup, spec_of(family), EXPANDABLE)
    assert expected.quantized_bytes == expected.constants_bytes == 0
    assert expected.unquantized_bytes == nbytes(list(load_model(family, setup).parameters()))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_and_routers_stay_in_16_bits(family: str) -> None:
    model = load_model(family, make_setup(family))
    experts = [p for name, p in model.named_parameters() if "experts" in name or "mlp.gate" in name]
    assert len(experts) == 9
    assert {str(p.dtype) for p in experts} == {"torch.bfloat16"}
