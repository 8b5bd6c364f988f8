"""What a setup trains: the memory model against the parameters that PEFT and TRL make trainable."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from peft import get_peft_model

from launcher.training import build
from planner.base.errors import FieldError, InputError
from planner.setup.run import TrainingRun
from planner.setup.trained import Trained
from planner.setup.training_setup import TrainingSetup

from .small_models import FAMILIES, load_model, spec_of
from .test_build import MODEL, make_trainer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
CASES: list[tuple[str, str | list[str]]] = [
    *((family, "all-linear") for family in FAMILIES),
    ("llama", ["q_proj", "v_proj"]),
    ("llama", ["self_attn.o_proj", "down_proj"]),
    ("phi3", ["qkv_proj", "gate_up_proj"]),
    ("qwen3_moe", ATTENTION),
    ("mixtral", ATTENTION),
    ("qwen3_moe", EXPERT_TARGETS),
]


def make_setup(family: str, **knobs: Any) -> TrainingSetup:
    return TrainingSetup(**{"model": family, "max_length": 64, "lora_r": 8, **knobs})


def sizes(trained: Trained) -> Counter[int]:
    found: Counter[int] = Counter()
    for tensor in trained.tensors:
        found[tensor.elements] += tensor.count
    return found


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_adapter_tensors(family: str, targets: str | list[str]) -> None:
    setup = make_setup(family, method="lora", target_modules=targets)
    model = get_peft_model(load_model(family, setup), build.lora_config(setup))
    real = [p for p in model.parameters() if p.requires_grad]
    expected = TrainingRun(setup=setup, model=spec_of(family)).trained
    assert sizes(expected) == Counter(p.numel() for p in real)
    assert {p.element_size() for p in real} == {expected.element_width} == {4}


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_adapter_names_and_shapes(family: str) -> None:
    setup = make_setup(family, method="lora")
    model = get_peft_model(load_model(family, setup), build.lora_config(setup))
    real: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))
            real[short.removesuffix(".default.weight"), tuple(parameter.shape)] += 1
    expected = {
        (tensor.name.replace(".weight.", "."), tensor.shape): tensor.count
        for tensor in TrainingRun(setup=setup, model=spec_of(family)).trained.tensors
    }
    assert expected == real


@pytest.mark.parametrize(
    ("knobs", "element_width"),
    [({}, 2), ({"method": "lora"}, 4), ({"method": "full"}, 2), ({"dtype": "float32"}, 2)],
    ids=["qlora", "lora", "full", "qlora-float32"],
)
def test_what_trl_trains(knobs: dict[str, Any], element_width: int, tmp_path: Path) -> None:
    """TRL casts a quantised model's adapters to bf16 and leaves the others as PEFT made them."""
    rank = {"lora_r": 4} if knobs.get("method") != "full" else {}
    setup = TrainingSetup(
        **{"model": "demo", "max_length": 64, "per_device_train_batch_size": 2, **rank, **knobs}
    )
    trainer = make_trainer(setup, tmp_path)
    real = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = TrainingRun(setup=setup, model=demo_spec()).trained
    assert sizes(expected) == Counter(p.numel() for p in real)
    assert {p.element_size() for p in real} == {expected.element_width} == {element_width}


def demo_spec() -> Any:
    from launcher.models.inspect import inspect_config

    return inspect_config(Path(MODEL), model_id="demo", hub_id="demo")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_unknown_target_is_refused(family: str) -> None:
    setup = make_setup(family, target_modules=["q_proj", "query_key_value"])
    with pytest.raises(FieldError, match="query_key_value"):
        _ = TrainingRun(setup=setup, model=spec_of(family)).trained


@pytest.mark.parametrize(
    "targets", [["gate_proj", "down_proj"], ["gate_proj", "up_proj"], ["q_proj", "down_proj"]]
)
def test_half_an_expert_is_refused(targets: list[str]) -> None:
    with pytest.raises(InputError, match="gate_proj"):
        _ = TrainingRun(
            setup=make_setup("qwen3_moe", target_modules=targets), model=spec_of("qwen3_moe")
        ).trained


@pytest.mark.parametrize(("init", "raised"), [("pissa", TypeError), ("orthogonal", RuntimeError)])
def test_what_is_refused_of_4_bits_is_what_peft_refuses(init: str, raised: type[Exception]) -> None:
    """PEFT 0.21.2. Where this fails it can do it now: planner/setup/training_knobs.py, _REFUSED_INITS."""
    setup = make_setup("llama", lora_r=4, target_modules=["v_proj"])
    config = build.lora_config(setup)
    config.init_lora_weights = init
    with pytest.raises(raised):
        get_peft_model(load_model("llama", setup), config)


def test_a_head_is_never_adapted() -> None:
    setup = make_setup("llama", method="lora")
    model = get_peft_model(load_model("llama", setup), build.lora_config(setup))
    assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not any(
        "lm_head" in tensor.name
        for tensor in TrainingRun(setup=setup, model=spec_of("llama")).trained.tensors
    )
