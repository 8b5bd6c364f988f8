"""A change of what TRL, transformers, PEFT or bitsandbytes keep is told by the part that moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

import peft
import torch
from bitsandbytes.autograd._functions import MatMul4Bit
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.dora import DoraLinearLayer
from torch.utils.checkpoint import CheckpointPolicy
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from trl.models import selective_activation_checkpointing
from trl.trainer import sft_trainer

from planner.setup.training_setup import TrainingSetup

from . import layer_parts
from .layer_parts import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    ATTENTION,
    BASE_LAYER,
    CHECKPOINT,
    MLP,
    NORM,
    PREPARATION,
    expected_parts,
    found_parts,
    moved,
)
from .like_cuda import like_cuda
from .real_steps import first_step

pytestmark = pytest.mark.slow

LENGTH, BATCH = 512, 2
QLORA: dict[str, Any] = {"method": "qlora"}
DORA = {**QLORA, "use_dora": True}
KBIT = {**QLORA, "prepare_for_kbit_training": True}
SELECTIVE = {**QLORA, "selective_checkpointing": True}
SETUPS: list[tuple[str, dict[str, Any]]] = [
    *((family, {"method": method}) for family in ("llama", "gemma3", "olmo2") for method in ("lora", "full")),
    *((family, QLORA) for family in ("llama", "qwen3", "gemma3", "olmo2", "granite")),
    *((family, {**QLORA, "gradient_checkpointing": False}) for family in ("llama", "gemma3")),
    *((family, DORA) for family in ("llama", "gemma3")),
    ("llama", {**DORA, "method": "lora"}),
    ("llama", {**DORA, "lora_dropout": 0.05}),
    *((family, KBIT) for family in ("llama", "gemma3")),
    *((family, SELECTIVE) for family in ("llama", "qwen3")),
    ("llama_unshared", {**QLORA, "dtype": "float32"}),
]


@pytest.fixture(autouse=True)
def _like_cuda() -> Iterator[None]:
    with like_cuda():
        yield


def make_setup(family: str, knobs: dict[str, Any]) -> TrainingSetup:
    fixed = {"optim": "sgd", "attn_implementation": "sdpa"}
    return TrainingSetup(
        model=family, max_length=LENGTH, per_device_train_batch_size=BATCH, **{**fixed, **knobs}
    )


@pytest.mark.parametrize(("family", "knobs"), SETUPS, ids=str)
def test_every_part_keeps_what_the_model_says(family: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    setup = make_setup(family, knobs)
    found = found_parts(first_step(family, setup, tmp_path))
    assert found == pytest.approx(expected_parts(family, setup), rel=layer_parts.TOLERANCE)


def one_tensor_more(patch: pytest.MonkeyPatch, module: type[Any]) -> None:
    """Multiply a module's output by ones that want a gradient: both factors are kept."""
    forward = module.forward

    def keeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        first = found[0] if isinstance(found, tuple) else found
        more = first * torch.ones_like(first).requires_grad_()
        return (more, *found[1:]) if isinstance(found, tuple) else more

    patch.setattr(module, "forward", keeping)


def matmul_that_saves_its_input(patch: pytest.MonkeyPatch) -> None:
    forward = MatMul4Bit.forward

    def saving(ctx: Any, a: Any, *rest: Any) -> Any:
        ctx.also_kept = a.clone()
        return forward(ctx, a, *rest)

    patch.setattr(MatMul4Bit, "forward", staticmethod(saving))


def norm_that_stays_wide(patch: pytest.MonkeyPatch) -> None:
    forward = LlamaRMSNorm.forward
    patch.setattr(LlamaRMSNorm, "forward", lambda self, x: forward(self, x.float()))


def policy_that_saves_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        selective_activation_checkpointing,
        "_build_policy_fn",
        lambda ops: lambda *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE,
    )


def preparation_that_skips_the_head(patch: pytest.MonkeyPatch) -> None:
    prepare = peft.prepare_model_for_kbit_training

    def skipping(model: Any, **kwargs: Any) -> Any:
        prepared = prepare(model, **kwargs)
        prepared.lm_head.to(torch.bfloat16)
        return prepared

    patch.setattr(peft, "prepare_model_for_kbit_training", skipping)


def adapters_that_stay_wide(patch: pytest.MonkeyPatch) -> None:
    """As if TRL's cast to bf16 (sft_trainer.py:908) were left out: PEFT makes adapters in fp32."""
    make = sft_trainer.SFTTrainer.__init__

    def making(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    patch.setattr(sft_trainer.SFTTrainer, "__init__", making)


CHANGES: dict[str, tuple[str, dict[str, Any], Callable[[pytest.MonkeyPatch], None]]] = {
    "bitsandbytes: MatMul4Bit saves its input": (BASE_LAYER, QLORA, matmul_that_saves_its_input),
    "PEFT: LoRA keeps a tensor more": (ADAPTER, QLORA, lambda patch: one_tensor_more(patch, Linear4bit)),
    "PEFT: DoRA keeps a tensor more": (ADAPTER, DORA, lambda patch: one_tensor_more(patch, DoraLinearLayer)),
    "PEFT: preparation skips the head": (PREPARATION, KBIT, preparation_that_skips_the_head),
    "transformers: the norm's output stays fp32": (NORM, QLORA, norm_that_stays_wide),
    "transformers: the norm keeps a tensor more": (
        NORM,
        QLORA,
        lambda patch: one_tensor_more(patch, LlamaRMSNorm),
    ),
    "transformers: attention keeps a tensor more": (
        ATTENTION,
        QLORA,
        lambda patch: one_tensor_more(patch, LlamaAttention),
    ),
    "transformers: the MLP keeps a tensor more": (MLP, QLORA, lambda patch: one_tensor_more(patch, LlamaMLP)),
    "TRL: selective checkpointing saves nothing": (CHECKPOINT, SELECTIVE, policy_that_saves_nothing),
    "TRL: adapters stay in fp32": (ADAPTER_WEIGHTS, QLORA, adapters_that_stay_wide),
}


_unchanged: dict[TrainingSetup, dict[str, int]] = {}


def unchanged(setup: TrainingSetup, folder: Path) -> dict[str, int]:
    """What is found without a change: most are made to the same setup."""
    if setup not in _unchanged:
        _unchanged[setup] = found_parts(first_step("llama", setup, folder))
    return _unchanged[setup]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_upstream_is_named(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard itself: each change makes the comparison name the part, and without it none is named."""
    part, knobs, apply = CHANGES[change]
    setup = make_setup("llama", knobs)
    expected = expected_parts("llama", setup)
    assert moved(unchanged(setup, tmp_path / "before"), expected) is None
    apply(monkeypatch)
    assert moved(found_parts(first_step("llama", setup, tmp_path / "after")), expected) == part
