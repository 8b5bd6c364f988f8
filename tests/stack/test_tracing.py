"""Models described by tracing: those with a recipe agree with it, and one that nobody has heard of is planned
and trained as planned.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from launcher.models import inspect
from launcher.models.inspect import inspect_config
from launcher.models.traced_spec import describe_traced
from planner.memory import estimate_memory
from planner.memory.decoder.live_bytes import at
from planner.memory.estimate import live_memory
from planner.memory.measured.files import coefficients_for
from planner.memory.step.resident import INPUT_BYTES_PER_TOKEN
from planner.models.spec import ModelSpec
from planner.planning.make_plan import make_plan
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

from . import small_models, unheard_of
from .like_cuda import like_cuda
from .real_steps import first_step, measure
from .test_live_bytes import POSITION_IDS_BYTES, largest, make_setup

pytestmark = pytest.mark.slow

KEPT = {"gradient_checkpointing": False}
SETUPS: list[dict[str, Any]] = [
    {},
    KEPT,
    {"method": "lora", **KEPT},
    {"method": "full"},
    {"method": "full", "dtype": "float32", **KEPT},
    {"method": "full", "gradient_accumulation_steps": 4},
    {"lora_dropout": 0.1, **KEPT},
    {"lora_dropout": 0.1, "lora_r": 64, "target_modules": ("down_proj",)},
    {"attn_implementation": "eager"},
    {"packing": True, **KEPT},
    {"selective_checkpointing": True},
    {"activation_offloading": True, **KEPT},
]


@functools.lru_cache(maxsize=8)
def traced(family: str) -> ModelSpec:
    """A family's small model described by tracing, whether it has a recipe or not."""
    model = inspect._build(dict(small_models.FAMILIES[family]), family)
    return describe_traced(model, model_id=family, hub_id=family, aliases=(), note="")


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_families_with_a_recipe_agree_with_it(family: str) -> None:
    """Norms, projections apart and fused, rotation of two kinds, two MLPs: within 1% of the recipe's bytes,
    and what the allocator makes of them too.
    """
    spec, recipe = traced(family), small_models.spec_of(family)
    assert (spec.parameters, spec.rotary_tables) == (recipe.parameters, recipe.rotary_tables)
    assert spec.embedding_multiplier == recipe.embedding_multiplier
    for knobs in SETUPS:
        fixed = {"model": family, "max_length": 512, "per_device_train_batch_size": 2}
        runs = [TrainingRun(setup=TrainingSetup(**fixed, **knobs), model=model) for model in (spec, recipe)]
        found, expected = (estimate_memory(run, replay=True) for run in runs)
        assert found.allocated_bytes == pytest.approx(expected.allocated_bytes, rel=0.01), knobs
        assert found.reserved_bytes == pytest.approx(expected.reserved_bytes, rel=0.02), knobs


def test_a_description_is_read_back_from_json() -> None:
    spec = traced("llama")
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.fixture
def comet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An architecture that transformers knows and vramwise does not, on a CPU that runs as a GPU."""
    unheard_of.register()
    monkeypatch.setitem(small_models.FAMILIES, "comet", unheard_of.TINY)
    with like_cuda():
        yield


@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "qlora"},
        {"method": "qlora", **KEPT},
        {"method": "lora", **KEPT},
        {"method": "full"},
        {"method": "full", **KEPT},
    ],
    ids=str,
)
def test_an_unheard_of_model_trains_in_the_bytes_that_were_planned(
    comet: None, knobs: dict[str, Any], tmp_path: Path
) -> None:
    """What forward keeps for backward, and the peaks of both passes: within 2% of what a real step does."""
    setup = make_setup("comet", **knobs)
    spec = traced("comet")
    assert [layer.indices for layer in spec.layers] == [(0, 2), (1, 3)]
    measured = measure(first_step("comet", setup, tmp_path), values=False)
    run = TrainingRun(setup=setup, model=spec)
    live = live_memory(run, gpu=None, coefficients=coefficients_for(None, EXPANDABLE), allocator=EXPANDABLE)
    timeline = live.timeline
    kept = timeline._kept_below(4) + at(
        timeline.final_norm.saved, timeline.shape.tokens, timeline.shape.scores
    )
    assert live.resident.tables_bytes == INPUT_BYTES_PER_TOKEN * setup.tokens_per_micro_step
    for found, expected in (
        (kept, measured.saved_bytes),
        (largest(timeline, "forward of"), measured.forward_bytes),
        (largest(timeline, "backward of"), measured.backward_bytes),
    ):
        assert found == pytest.approx(expected, rel=0.02, abs=POSITION_IDS_BYTES), measured.kept


def test_an_unheard_of_model_is_planned_and_said_to_be_traced(comet: None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(unheard_of.TINY))
    plan = make_plan(make_request(str(tmp_path), gpu="16GB"), inspector=inspect_config)
    assert plan.fits
    assert any("traced" in note for note in plan.memory.basis.notes)
