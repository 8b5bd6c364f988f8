"""Models described by tracing: those with a recipe agree with it, and one that nobody has heard of is planned
and trained as planned.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

import torch

from launcher.models import inspect
from launcher.models.inspect import inspect_config
from launcher.models.traced_spec import describe_traced
from launcher.models.tracing import model, recorder
from launcher.models.tracing.autocast import Fp32
from planner.memory import estimate_memory
from planner.memory.decoder.live_bytes import at
from planner.memory.estimate import live_memory
from planner.memory.measured.files import coefficients_for
from planner.memory.step.resident import INPUT_BYTES_PER_TOKEN
from planner.models.catalog import load_shipped
from planner.models.spec import LayerSpec, ModelSpec
from planner.models.traced import TracedBlock
from planner.planning.make_plan import make_plan
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.work import step_work

from . import small_models, unheard_of
from .like_cuda import like_cuda
from .live_bytes import LiveBytes
from .real_steps import Measured, first_step, measure
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
    built = inspect._build(dict(small_models.FAMILIES[family]), family)
    return describe_traced(built, model_id=family, hub_id=family, aliases=(), note="")


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
        runs = [TrainingRun(setup=TrainingSetup(**fixed, **knobs), model=one) for one in (spec, recipe)]
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
    assert_as_planned(TrainingRun(setup=setup, model=spec), measured)


@pytest.fixture
def casting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that runs as a GPU, whose traces are of QLoRA alone; torch's CPU makes no product before a
    softmax's backward.
    """
    monkeypatch.setattr(recorder, "TEMPORARIES", frozenset())
    monkeypatch.setattr(model, "METHODS", ("qlora",))
    traced.cache_clear()
    with like_cuda():
        yield
    traced.cache_clear()


@pytest.mark.parametrize(
    ("family", "knobs"),
    [*((family, {}) for family in small_models.TRACED), ("gpt_oss", {"experts_matmul": "sliced"})],
)
def test_mixtures_and_hybrids_train_in_the_bytes_that_were_planned(
    casting: None, family: str, knobs: dict[str, Any], tmp_path: Path
) -> None:
    """Experts in 4 bits, sinks, shared experts, Mamba layers: within 2% of what a real step does, and what is
    trained is what PEFT trains.
    """
    spec = traced(family)
    attention = {"attn_implementation": spec.default_attn_implementation}
    setup = make_setup(family, method="qlora", experts="4bit", **KEPT, **attention, **knobs)
    run = TrainingRun(setup=setup, model=spec)
    step = first_step(family, setup, tmp_path)
    trained = sum(one.numel() for one in step.model.parameters() if one.requires_grad)
    assert run.trained.elements == trained
    assert {layer.experts_per_token for layer in spec.layers if layer.experts} == {2}
    # What runs in loops of torch is told apart, in the layers that have such functions alone.
    assert all(bool(one.traced.unseen) == bool(one.traced.loops) for one in spec.layers if one.traced)
    for layer in step.stack.layers:
        layer.forward = casts_as_cuda(layer.forward)
    assert_as_planned(run, measure(step))


def casts_as_cuda(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with Fp32():
            return forward(*args, **kwargs)

    return run


def assert_as_planned(run: TrainingRun, measured: Measured) -> None:
    """What forward keeps for backward, and the peaks of both passes."""
    live = live_memory(run, gpu=None, coefficients=coefficients_for(None, EXPANDABLE), allocator=EXPANDABLE)
    timeline = live.timeline
    kept = timeline._kept_below(run.model.num_hidden_layers) + at(
        timeline.final_norm.saved, timeline.shape.tokens, timeline.shape.scores
    )
    # Tables and masks are made within the stack, and masks are let go when its forward pass returns.
    tables = live.resident.tables_bytes - INPUT_BYTES_PER_TOKEN * run.setup.tokens_per_micro_step
    masks = len(run.mask_windows) * run.micro_step.scores * run.storage.width
    for found, expected in (
        (kept + tables - masks, measured.saved_bytes),
        (largest(timeline, "forward of") + tables, measured.forward_bytes),
        (largest(timeline, "backward of") + tables - masks, measured.backward_bytes),
    ):
        assert found == pytest.approx(expected, rel=0.02, abs=POSITION_IDS_BYTES), measured.kept


def test_an_unheard_of_model_is_planned_and_said_to_be_traced(comet: None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(unheard_of.TINY))
    plan = make_plan(make_request(str(tmp_path), gpu="16GB"), inspector=inspect_config)
    assert plan.fits
    assert any("traced" in note for note in plan.memory.basis.notes)


class Making(LiveBytes):
    """How many storages are made."""

    count = 0

    def _watch(self, tensor: torch.Tensor, size_bytes: int, operation: str) -> None:
        self.count += tensor.untyped_storage()._cdata not in self._sizes
        super()._watch(tensor, size_bytes, operation)


def made_by_the_gated_rule(length: int) -> tuple[int, int]:
    """Tensors that both passes of transformers' reference make on a row of real values."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    shapes = {"query": (2, 32), "key": (2, 32), "value": (4, 32), "g": (4,), "beta": (4,)}
    given = {name: torch.zeros(1, length, *shape, requires_grad=True) for name, shape in shapes.items()}
    rule = modeling_qwen3_5.torch_chunk_gated_delta_rule.__wrapped__
    with Making(given.values()) as forward, torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = rule(**given, use_qk_l2norm_in_kernel=True)
    gradient = torch.zeros_like(output)
    with Making([gradient]) as backward:
        torch.autograd.grad(output, list(given.values()), gradient)
    return forward.count, backward.count


def test_what_a_loop_along_a_row_launches_is_counted() -> None:
    """As many tensors a position as the reference makes on real values, whatever its widths."""
    spec = load_shipped("qwen3.5-4b")
    loops = {layer.traced.loops for layer in spec.layers if layer.traced is not None} - {None}
    assert len(loops) == 1
    found = loops.pop()
    assert found is not None
    short, long = made_by_the_gated_rule(256), made_by_the_gated_rule(768)
    for work, few, many in zip((found.forward, found.backward), short, long, strict=True):
        # Gradients that autograd adds up are new ones here, and are not where a kernel adds in place.
        assert work.per_position == pytest.approx((many - few) / 512, rel=0.2)
        # Convolutions of the block are among what is made once.
        assert work.launches + 256 * work.per_position == pytest.approx(few, rel=0.2)
    run = TrainingRun(setup=TrainingSetup(model=spec.id, max_length=1024), model=spec)
    alone = replace(spec, layers=tuple(replace(one, traced=without_loops(one)) for one in spec.layers))
    before, after = step_work(replace(run, model=alone)), step_work(run)
    layers = sum(layer.count for layer in spec.layers if layer.traced and layer.traced.loops)
    once, again = (
        layers * (one.launches + 1024 * one.per_position) for one in (found.forward, found.backward)
    )
    assert after.forward["launch"] - before.forward["launch"] == pytest.approx(once)
    assert after.backward["launch"] - before.backward["launch"] == pytest.approx(once + again)


def without_loops(layer: LayerSpec) -> TracedBlock:
    assert layer.traced is not None
    return replace(layer.traced, loops=None)
