"""Setups drawn at random: each is answered, or refused in a line; none ends in a traceback."""

from __future__ import annotations

import random
from typing import Any

import pytest

from planner.base.errors import VramwiseError
from planner.base.units import MIB
from planner.gpus.target import resolve_gpu
from planner.memory.breakdown import FITTED, REPLAYED
from planner.memory.estimate import live_memory
from planner.memory.measured.files import coefficients_for
from planner.models.catalog import load_shipped
from planner.models.spec import ModelSpec
from planner.planning.estimation import Estimator
from planner.setup.cuda_allocator import ALLOCATORS, EXPANDABLE, EXPANDABLE_SETTING, NATIVE, VARIABLE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import OPTIMIZERS, TrainingSetup

from .families import DENSE

SEED, SETUPS = 11, 48
MODELS = (*DENSE, "gemma-2-2b", "qwen3-30b-a3b")
LARGEST_BYTES = 2**20 * MIB
"""Less than any replay has addresses for."""
SETTINGS = {EXPANDABLE: EXPANDABLE_SETTING, NATIVE: "expandable_segments:False"}


def adaptable(model: ModelSpec) -> list[str]:
    experts = {"gate_proj", "up_proj", "down_proj"} if any(one.experts for one in model.layers) else set()
    linears = {
        p.module_name
        for p in model.parameters
        if p.module_class == "Linear" and p.kind == "weight" and not p.is_output_head
    }
    return sorted(linears | experts)


def drawn(rng: random.Random) -> dict[str, Any]:
    """Knobs at random; most train a part of what an adapter may be put on, and keep what layers save."""
    model = load_shipped(rng.choice(MODELS))
    checkpoints = rng.random() < 0.3
    setup: dict[str, Any] = {
        "model": model.id,
        "method": rng.choice(("qlora", "qlora", "lora", "lora", "full")),
        "max_length": int(2 ** rng.uniform(3, rng.choice((12, 12, 12, 24)))),
        "per_device_train_batch_size": rng.choice((1, 1, 2, 5, 2**16)),
        "gradient_accumulation_steps": rng.choice((1, 2, 16)),
        "dtype": rng.choice(("bfloat16", "float16", "float32")),
        "optim": rng.choice(OPTIMIZERS),
        "gradient_checkpointing": checkpoints,
        "checkpointed_layers": rng.choice((None, 0, 1)) if checkpoints else None,
        "activation_offloading": rng.random() < 0.15,
        "attn_implementation": rng.choice((None, "sdpa", "eager", "flash_attention_2", "flex_attention")),
        "kernels": rng.choice(("none", "none", "liger")),
        "compile": rng.choice(("none", "none", "none", "regional")),
        "packing": rng.random() < 0.2,
    }
    if setup["method"] != "full":
        names = adaptable(model)
        setup["target_modules"] = rng.sample(names, rng.randint(1, len(names)))
        setup["lora_dropout"] = rng.choice((0.0, 0.05))
        setup["use_dora"] = rng.random() < 0.2
    return setup


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_every_setup_is_answered_or_refused(allocator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, SETTINGS[allocator])
    rng = random.Random(f"{SEED} {allocator}")
    estimator = Estimator(resolve_gpu("rtx-4090"))
    kinds = dict.fromkeys((REPLAYED, FITTED), 0)
    for _ in range(SETUPS):
        knobs = drawn(rng)
        try:
            found = estimator.estimate(TrainingSetup.from_dict(knobs)).memory
        except VramwiseError:
            continue
        assert 0 < found.allocated_bytes <= found.reserved_bytes <= found.process_bytes, knobs
        kinds[found.basis.reserve] += 1
        if found.basis.reserve == FITTED:
            assert found.allocated_bytes > LARGEST_BYTES, knobs
    assert kinds[REPLAYED] > SETUPS // 2
    assert kinds[FITTED]


def test_layers_keep_no_more_where_fewer_of_their_modules_are_trained() -> None:
    rng = random.Random(SEED)
    compared = 0
    while compared < SETUPS:
        setup = TrainingSetup(**{**drawn(rng), "compile": "none"})
        if not setup.uses_lora:
            continue
        kept = []
        for own in (setup, setup.replace(target_modules="all-linear")):
            run = TrainingRun(setup=own, model=load_shipped(setup.model))
            try:
                live = live_memory(
                    run, gpu=None, coefficients=coefficients_for(None, EXPANDABLE), allocator=EXPANDABLE
                )
            except VramwiseError:
                break
            kept.append(live.timeline.kept_bytes)
        else:
            assert kept[0] <= kept[1], setup
            compared += 1
