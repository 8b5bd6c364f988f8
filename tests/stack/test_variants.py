"""What is trained in other ways than by pairs of matrices alone: every trained tensor moves, and what a step
holds is what is planned, head and embedding included.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

import bitsandbytes as bnb
import torch
from trl.trainer import utils

from launcher.measuring.measured_data import token_dataset
from launcher.measuring.measured_run import _quiet, _tokenizer
from launcher.runs.training_job import TrainingJob
from launcher.training import build
from planner.memory.estimate import live_memory
from planner.memory.held.optimizer import FUSED_STEP_BYTES, saved_state
from planner.memory.measured.files import coefficients_for
from planner.memory.step.resident import INPUT_BYTES_PER_TOKEN
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.run import TrainingRun
from planner.setup.stack import TRL
from planner.setup.training_setup import TrainingSetup

from .like_cuda import like_cuda
from .live_bytes import LiveBytes, tensors_of
from .real_steps import RealStep, first_step
from .small_models import VOCABULARY, load_model, spec_of

LENGTH = 192
TILE = 32
"""Entries of the vocabulary in a tile of the head: torch operations stand in for its kernel on a CPU, and
hold a tile's numbers in fp32, which so few of them hide.
"""
MOVED: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_rslora": True},
    {"load_in_8bit": True},
    {"loraplus_lr_ratio": 16.0, "optim": "adamw_8bit", "init_lora_weights": "gaussian"},
    {"method": "lora", "dtype": "bfloat16", "bias": "lora_only"},
    {"method": "lora", "bias": "all"},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"trainable_token_indices": [3, 5]},
    *({"peft_type": name} for name in ("vera", "miss", "oft")),
    {"optim": "lorafa"},
    {"optim": "lorafa", "method": "lora", "modules_to_save": ["lm_head"]},
]
KEPT = {"gradient_checkpointing": False}
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("llama_wide", {"modules_to_save": ["embed_tokens", "lm_head"], **KEPT}),
    ("llama_wide", {"modules_to_save": ["embed_tokens"], "method": "lora"}),
    ("tied_wide", {"modules_to_save": ["lm_head"]}),
    ("llama_wide", {"trainable_token_indices": [3, 4, 5, 6], **KEPT}),
    ("tied_wide", {"trainable_token_indices": [3, 4, 5, 6], "method": "lora"}),
    ("llama_wide", {"optim": "lorafa", "method": "lora"}),
    *(
        ("llama_wide", {"peft_type": name, "max_length": 512, **knobs})
        for name in ("vera", "miss", "oft")
        for knobs in (KEPT, {"method": "lora"})
    ),
    ("llama_wide", {"optim": "lorafa", "lora_dropout": 0.05, **KEPT}),
]


@pytest.fixture(autouse=True)
def _like_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE)
    with like_cuda():
        yield


def name_of(case: Any) -> str:
    family, knobs = case
    return "-".join([family, *map(str, knobs.values())])


@pytest.mark.parametrize("variant", MOVED, ids=lambda variant: "-".join(map(str, variant)))
def test_all_that_a_variant_trains_moves(tmp_path: Path, variant: dict[str, Any]) -> None:
    """Tensors that stay where they were are named: TRL's bfloat16 rounds steps of some away."""
    setup = TrainingSetup(
        **{
            "model": "tiny",
            "max_length": LENGTH,
            "lora_r": 8,
            "dtype": "float32",
            "optim": "adamw_torch_fused",
            **variant,
        }
    )
    model = load_model("tiny", setup)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()  # as large as those of published models
    with _quiet():
        trainer = build.build_trainer(
            setup,
            TrainingJob(
                setup=setup,
                model_source="tiny",
                data_path="tokens",
                max_steps=2,
                learning_rate=2e-4,
                warmup_ratio=0.0,
                lr_scheduler_type="constant",
            ),
            model=model,
            tokenizer=_tokenizer(),
            train_dataset=token_dataset([[*range(VOCABULARY - 1)]] * 2),
            eval_dataset=None,
            output_dir=tmp_path,
            on_gpu=False,
        )
        before = {name: p.detach().clone() for name, p in trained(trainer.model).items()}
        trainer.train()
    now = trained(trainer.model)
    assert [name for name, value in before.items() if torch.equal(value, now[name])] == []
    planned = TrainingRun(setup=setup, model=spec_of("tiny")).trained
    assert planned.elements == sum(p.numel() for p in now.values())
    if "8bit" not in setup.optim:
        steps = FUSED_STEP_BYTES * planned.tensor_count if setup.optim == "adamw_torch_fused" else 0
        assert state_bytes(trainer.optimizer) == saved_state(setup.optim, planned)[0] - steps
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]}
    ratio = setup.loraplus_lr_ratio
    assert rates == ({2e-4} if ratio is None else {2e-4, 2e-4 * ratio})
    if ratio is not None:
        _, _, faster, _ = trainer.optimizer.param_groups
        names = {id(p): name for name, p in now.items()}
        assert {"lora_B" in names[id(p)] for p in faster["params"]} == {True}
        assert len(faster["params"]) == sum("lora_B" in name for name in now)
    eight = [module for module in trainer.model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    assert bool(eight) == setup.load_in_8bit


def state_bytes(optimizer: Any) -> int:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.numel() > 1)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step_peak(step: RealStep) -> tuple[int, int]:
    """Live bytes of a micro-step at most, and of what it leaves."""
    inputs = {name: step.inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    gc.collect()
    with LiveBytes([*tensors_of(step.model), *inputs.values()], values=False) as live:
        with step.autocast():
            output = step.model(**inputs, use_cache=False, fused_lm_head=True)
        loss = output.loss
        del output
        loss.backward()
        del loss
        gc.collect()
    return live.peak_bytes, live.live_bytes


@pytest.mark.parametrize("case", STEPS, ids=name_of)
def test_a_step_holds_what_is_planned(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    family, knobs = case
    fixed = {"max_length": LENGTH, "optim": "sgd", "attn_implementation": "sdpa"}
    setup = TrainingSetup(model=family, **{**fixed, **knobs})
    run = TrainingRun(setup=setup, model=spec_of(family), stack=replace(TRL, head_vocabulary=TILE))
    step = first_step(family, setup, tmp_path)
    real = [p for p in step.model.parameters() if p.requires_grad]
    planned: Counter[tuple[tuple[int, ...], int]] = Counter()
    for tensor in run.trained.tensors:
        planned[tensor.shape, tensor.element_width] += tensor.count
    assert planned == Counter((tuple(p.shape), p.element_size()) for p in real)
    peak, left = step_peak(step)
    live = live_memory(run, gpu=None, coefficients=coefficients_for(None, EXPANDABLE), allocator=EXPANDABLE)
    tables = live.resident.tables_bytes - INPUT_BYTES_PER_TOKEN * setup.tokens_per_micro_step
    largest = live.timeline.largest()
    assert left == pytest.approx(run.trained.size_bytes, abs=4096)
    assert largest.total_bytes + tables == pytest.approx(peak, rel=0.02)
