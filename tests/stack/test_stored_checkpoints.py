"""Checkpoints that bitsandbytes quantised before: planned from their folder, loaded, trained, merged.

The folders are what transformers writes, `save_pretrained` of a model that it loaded in 4 bits.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.models.inspect import inspect_config
from launcher.training import build
from launcher.training.callbacks import decoder_layers
from launcher.training.loading.eight_bits import keep_no_inputs
from planner.base.errors import InputError
from planner.memory.allocators.native import rounded
from planner.memory.held.weights import loaded_weights
from planner.models.catalog import resolve_model
from planner.models.spec import ModelSpec
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.methods import as_stored
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from tests.each import for_each

from . import real_steps, test_live_bytes
from .like_cuda import like_cuda
from .live_bytes import constants_of
from .small_models import load_model
from .test_merging import adapter_on, merged_by_us, weights_in

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FAMILY = "llama_unshared"
STORED: dict[str, dict[str, Any]] = {
    "plain": {"bnb_4bit_quant_type": "fp4"},
    # As dynamic quants leave some modules of some layers in 16 bits, and some of all.
    "dynamic": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp", "self_attn.k_proj"],
    },
    "eight": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.2.self_attn"]},
}
QUANTISED = (bnb.nn.Params4bit, bnb.nn.Int8Params)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@functools.cache
def stored(name: str, place: Path) -> Path:
    """A folder of 4-bit weights, made in float16 from a model in float32, as most of the Hub's are."""
    if not (place / "base").is_dir():
        load_model(
            FAMILY, TrainingSetup(model=FAMILY, max_length=8, method="full", dtype="float32")
        ).save_pretrained(place / "base")
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float16}
    knobs = STORED[name] if name == "eight" else {**four, **STORED[name]}
    quantised = BitsAndBytesConfig(**knobs)
    model = AutoModelForCausalLM.from_pretrained(
        place / "base", dtype=torch.float16, quantization_config=quantised, device_map={"": CPU}
    )
    model.save_pretrained(place / name)
    return place / name


def spec_at(folder: Path) -> ModelSpec:
    return resolve_model(str(folder), inspector=inspect_config)


def setup_of(folder: Path, **knobs: Any) -> TrainingSetup:
    chosen = {"model": str(folder), "max_length": 64, "optim": "sgd", "dtype": "float32", **knobs}
    return as_stored(TrainingSetup(**chosen), spec_at(folder))


def loaded(folder: Path, **knobs: Any) -> Any:
    return build.load_model(setup_of(folder, **knobs), str(folder), device=CPU, allow_download=False)


@for_each(STORED)
def test_bytes_are_those_of_the_folder(name: str, place: Path) -> None:
    folder = stored(name, place)
    model = loaded(folder)
    run = TrainingRun(setup=setup_of(folder), model=spec_at(folder))
    expected = loaded_weights(run.model, run.storage, EXPANDABLE).memory
    quantised = [p for p in model.parameters() if isinstance(p, QUANTISED)]
    plain = [p for p in model.parameters() if not isinstance(p, QUANTISED)]
    constants = [
        tensor
        for p in quantised
        for tensor in ([p.SCB] if isinstance(p, bnb.nn.Int8Params) else constants_of(p.quant_state))
    ]
    assert expected.quantized_bytes == sum(p.nbytes for p in quantised)
    assert expected.constants_bytes == sum(tensor.nbytes for tensor in constants)
    assert expected.unquantized_bytes == sum(p.nbytes for p in plain)
    held = (*quantised, *constants, *plain)
    assert expected.allocated_bytes == sum(rounded(tensor.nbytes) for tensor in held)
    assert expected.largest_bytes == max(p.nbytes for p in plain)
    for layer, kind in enumerate(decoder_layers(model)):
        kept = {
            path.rpartition(".")[2]
            for path, module in kind.named_modules()
            if type(module) is torch.nn.Linear
        }
        assert kept == {name for one in run.model.layers if layer in one.indices for name in one.kept}
    size = (folder / "model.safetensors").stat().st_size
    assert run.model.download_bytes == pytest.approx(size, rel=0.02)


@for_each(STORED)
def test_products_are_computed_as_the_plan_says(name: str, place: Path) -> None:
    model = loaded(stored(name, place))
    if name == "eight":
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int8}
        return
    four = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert {module.compute_dtype for module in four} == {torch.float32}
    assert {module.weight.quant_state.dtype for module in four} == {torch.float32}
    quantised = {id(module.weight) for module in four}
    assert {p.dtype for p in model.parameters() if id(p) not in quantised} == {torch.float32}


@for_each([(name, kept) for name in STORED for kept in (True, False)])
def test_live_bytes_are_planned(
    case: tuple[str, bool], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored(case[0], place)
    setup = setup_of(
        folder,
        max_length=test_live_bytes.LENGTH,
        per_device_train_batch_size=test_live_bytes.BATCH,
        attn_implementation="sdpa",
        gradient_checkpointing=case[1],
    )
    monkeypatch.setattr(test_live_bytes, "spec_of", lambda _: spec_at(folder))
    monkeypatch.setattr(
        real_steps,
        "load_model",
        lambda _, setup: build.load_model(setup, str(folder), device=CPU, allow_download=False),
    )
    with like_cuda():
        step = real_steps.first_step(str(folder), setup, tmp_path)
        trained = [p for p in step.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.bfloat16}
        planned = TrainingRun(setup=setup, model=spec_at(folder)).trained
        assert planned.size_bytes == sum(p.nbytes for p in trained)
        test_live_bytes.compare(str(folder), setup, real_steps.measure(step))


@for_each(["dynamic", "eight"])
def test_it_is_merged_into_what_it_stands_for(name: str, place: Path) -> None:
    folder = stored(name, place)
    adapter = adapter_on(place / "base", place / f"{name}-adapter")
    merged_by_us(folder, [adapter], place / f"{name}-ours", base="dequantised")
    ours = weights_in(place / f"{name}-ours" / "merged")
    whole = loaded(folder, dtype="bfloat16").dequantize().to(torch.bfloat16).float()
    theirs = PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload().to(torch.bfloat16).state_dict()
    assert set(ours) == set(weights_in(place / "base"))
    # 8 bits: transformers scales by a rounded 1 / 127 (integrations/bitsandbytes.py, dequantize_bnb_weight).
    step = 2**-7 if name == "eight" else 0.0
    wrong = [
        one
        for one in ours
        if not torch.allclose(ours[one].float(), theirs[one].float(), rtol=step, atol=step / 50)
    ]
    assert wrong == []


def test_bitsandbytes_keeps_inputs_still() -> None:
    """Where this fails, launcher/training/loading/eight_bits.py can go (and its finding be corrected)."""
    keep_no_inputs()
    weight, scales, _ = bnb.functional.int8_vectorwise_quant(torch.randn(8, 16).half())
    state = bnb.MatmulLtState(CB=weight, SCB=scales)
    state.has_fp16_weights, state.threshold = False, 6.0
    x = torch.randn(4, 16)
    for product in (MatMul8bitFp, MatMul8bitLt):
        kept = SimpleNamespace(needs_input_grad=(True, False, False, False, False))
        product.forward.__wrapped__(kept, x, weight, None, None, state)
        assert any(value is x for value in (getattr(kept, "A", None), *getattr(kept, "tensors", ())))
        product.forward(kept, x, weight, None, None, state)
        assert not any(value is x for value in (getattr(kept, "A", None), *getattr(kept, "tensors", ())))


@for_each([{"method": "lora"}, {"bnb_4bit_quant_type": "nf4"}, {"bnb_4bit_use_double_quant": False}])
def test_a_job_of_other_weights_does_not_load_them(knobs: dict[str, Any], place: Path) -> None:
    name = "dynamic" if "bnb_4bit_use_double_quant" in knobs else "plain"
    folder = stored(name, place)
    setup = TrainingSetup(model=str(folder), max_length=8, **knobs)
    with pytest.raises(InputError, match=str(folder)):
        build.load_model(setup, str(folder), device=CPU, allow_download=False)
