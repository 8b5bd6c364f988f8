"""What compiled decoder layers keep for the backward pass, and that their gradients are right.

A layer takes two to three seconds to compile, however many there are of its shape: what several tests look
at is compiled once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model
from trl.models import enable_selective_activation_checkpointing

from launcher.training import build
from launcher.training.callbacks import decoder_layers
from launcher.training.compilation import compile_decoder_layers, recompute_all
from planner.memory.compiled.kept import kept_names, kept_sizes
from planner.memory.decoder.groups import layer_groups
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from tests.each import for_each
from tests.stack.small_models import BASE, LAYERS, load_model, spec_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BATCH, LENGTH, RANK = 1, 64, 8
MASKED_BATCH = 2
TOKENS = BATCH * LENGTH
HIDDEN, WIDE = BASE["hidden_size"], BASE["intermediate_size"]
HEADS, KV = BASE["num_attention_heads"], BASE["hidden_size"] // 4
PARTITIONED = "aot_eager_decomp_partition"  # inductor's partitioner without its code generation


def make_model(*, family: str = "llama", selective: bool = False, **changes: Any) -> Any:
    setup = TrainingSetup(model=family, max_length=LENGTH, lora_r=RANK, **changes)
    base = load_model(family, setup)
    if selective:
        enable_selective_activation_checkpointing(base)
    torch.manual_seed(1)
    model = get_peft_model(base, build.lora_config(setup))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(build.torch_dtype(setup))
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    model.train()
    model.enable_input_require_grads()
    if setup.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def compile_model(model: Any, *, budget: float | None = None, backend: str = PARTITIONED) -> None:
    compile_decoder_layers(model, activation_memory_budget=budget, backend=backend)
    recompute_all(model)


def loss_of(model: Any) -> Any:
    torch.manual_seed(3)
    ids = torch.arange(TOKENS).view(BATCH, LENGTH) % 199
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept_by_layer(model: Any, *, run: Callable[[Any], Any] = loss_of) -> list[dict[int, torch.Tensor]]:
    """What each compiled layer saved and computed itself: its inputs and the model's own tensors left out."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.extend(t for t in (*args, *kwargs["position_embeddings"])),
            with_kwargs=True,
        )
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    run(model)
    known = {t.untyped_storage().data_ptr() for t in inputs}
    for module in model.modules():
        known |= {t.untyped_storage().data_ptr() for t in module._parameters.values() if t is not None}
        state = getattr(module, "quant_state", None)
        if state is not None:
            nested = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            known |= {t.untyped_storage().data_ptr() for t in nested}
    saved = [out.grad_fn.saved_tensors for out in outputs]
    assert all(saved)
    return [
        {t.untyped_storage().data_ptr(): t for t in tensors if t.untyped_storage().data_ptr() not in known}
        for tensors in saved
    ]


def kept_bytes(kept: dict[int, torch.Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in kept.values() if t.is_floating_point())


def padded_loss_of(model: Any) -> Any:
    ids = torch.arange(MASKED_BATCH * LENGTH).view(MASKED_BATCH, LENGTH) % 199
    mask = torch.ones_like(ids)
    mask[-1, LENGTH // 2 :] = 0
    return model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss


@pytest.mark.parametrize("family", ["llama", "llama_paired", "qwen3", "qwen3_paired", "gemma3"])
def test_a_padded_layer_keeps_what_the_model_says(family: str) -> None:
    """Repeated values and keys where they are kept, and nowhere the mask in 16 bits."""
    model = make_model(family=family, gradient_checkpointing=False)
    compile_model(model)
    setup = TrainingSetup(
        model=family,
        max_length=LENGTH,
        per_device_train_batch_size=MASKED_BATCH,
        lora_r=RANK,
        gradient_checkpointing=False,
        compile="regional",
    )
    spec = spec_of(family)
    parts, _ = layer_groups(TrainingRun(setup=setup, model=spec, padded=True))
    part = next(part for part in parts if 1 in part.indices)
    names = kept_names(part.layer, part.knobs, input_requires_grad=True) - {"x"}
    sizes = kept_sizes(part.layer, part.knobs)
    kept = kept_by_layer(model, run=padded_loss_of)[1]
    assert kept_bytes(kept) == MASKED_BATCH * LENGTH * sum(sizes[name] for name in names)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What each layer of a compiled model kept, and how many graphs its layers became."""

    kept: list[dict[int, torch.Tensor]]
    graphs: int
    breaks: int


WAYS: dict[str, dict[str, Any]] = {
    "checkpointed": {},
    "selective": {"selective": True},
    "none": {"gradient_checkpointing": False},
}


@functools.cache
def compiled(way: str) -> Compiled:
    """A model compiled and run in one of WAYS."""
    model = make_model(**WAYS[way])
    compile_model(model)
    counters = torch._dynamo.utils.counters
    counters.clear()
    kept = kept_by_layer(model)
    breaks = sum(counters["graph_break"].values())
    return Compiled(kept=kept, graphs=counters["stats"]["unique_graphs"], breaks=breaks)


@pytest.mark.parametrize("way", ["checkpointed", "none"])
def test_no_weight_is_kept_dequantised(way: str) -> None:
    for kept in compiled(way).kept:
        assert all(TOKENS in t.shape or LENGTH in t.shape for t in kept.values() if t.is_floating_point())


def test_a_checkpointed_layer_keeps_its_input_alone() -> None:
    assert [kept_bytes(kept) for kept in compiled("checkpointed").kept] == [0] * LAYERS


@for_each(WAYS)
def test_layers_of_one_shape_share_their_code(way: str) -> None:
    assert (compiled(way).graphs, compiled(way).breaks) == (1, 0)


def test_the_first_k_layers_keep_their_input_alone() -> None:
    model = make_model()
    for layer in decoder_layers(model)[1:]:
        layer.gradient_checkpointing = False
    compile_model(model)
    first, *others = [kept_bytes(kept) for kept in kept_by_layer(model)]
    assert first == 0
    assert all(others)


def test_selective_checkpointing_keeps_attention() -> None:
    for kept in compiled("selective").kept:
        assert kept_bytes(kept) == TOKENS * (2 * HIDDEN + 4 * HEADS)


def test_without_checkpointing_elementwise_results_are_recomputed() -> None:
    # query, attention output, first residual sum; key and value; gate and up; seven products x A^T
    widths = 3 * HIDDEN + 2 * KV + 2 * WIDE + 7 * RANK
    statistics = 4 * (HEADS + 2)  # logsumexp and the two norms' reciprocal roots, float32
    for kept in compiled("none").kept:
        assert kept_bytes(kept) == TOKENS * (2 * widths + statistics)


def through_hooks(model: Any) -> tuple[list[tuple[int, ...]], dict[str, torch.Tensor]]:
    """Shapes of 16-bit tensors that TRL's offloading would take to the host, weights left out as there, and
    the gradients when copies come back (trl/models/activation_offloading.py, OffloadActivations).
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() in own:
            return tensor
        if tensor.dtype == torch.bfloat16:
            shapes.append(tuple(tensor.shape))
        return tensor.clone()

    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    loss.backward()
    return shapes, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_offloading_takes_a_compiled_checkpointed_layers_input_alone() -> None:
    """And its gradients are those of the uncompiled layers, whose checkpoints it takes."""
    plain, compiled = make_model(), make_model()
    compile_model(compiled)
    expected_shapes, expected = through_hooks(plain)
    shapes, found = through_hooks(compiled)
    layers = len(decoder_layers(compiled))
    taken = [shape for shape in shapes if shape == (BATCH, LENGTH, HIDDEN)]
    assert len(taken) == len([shape for shape in expected_shapes if shape == (BATCH, LENGTH, HIDDEN)])
    assert len(taken) <= layers + 1  # the final norm's input beside them
    # All else are the rotary tables of a position each.
    head_dim = HIDDEN // HEADS
    assert {shape for shape in shapes if shape not in taken} <= {(1, LENGTH, head_dim)}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": False}, {"selective": True}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_equal_the_uncompiled_ones(family: str, changes: dict[str, Any]) -> None:
    model = make_model(family=family, dtype="float32", **changes)
    expected = gradients(model)
    compile_model(model)
    got = gradients(model)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)


def error_of_slope(model: Any) -> float:
    """How far the gradient is from finite differences along a random direction, relative."""
    found = gradients(model)
    weights = {name: p for name, p in model.named_parameters() if name in found}
    torch.manual_seed(7)
    direction = {name: torch.randn_like(p) * p.abs().mean() for name, p in weights.items()}
    slope = sum((found[name] * direction[name]).sum().item() for name in weights)
    step, losses = 0.03, []
    for sign in (1, -2):
        for name, parameter in weights.items():
            parameter.data.add_(direction[name], alpha=sign * step)
        losses.append(float(loss_of(model)))
    return abs(slope - (losses[0] - losses[1]) / (2 * step)) / abs(slope)


class OneProduct(torch.nn.Module):
    """In a decoder layer's place of attention: its query projection, adapter and dropout included."""

    def __init__(self, q_proj: torch.nn.Module) -> None:
        super().__init__()
        self.q_proj = q_proj

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.q_proj(hidden_states), None


@pytest.mark.parametrize(
    ("changes", "budget", "right"),
    [
        ({}, None, True),
        ({"gradient_checkpointing": False}, None, True),
        ({"gradient_checkpointing": False}, 0.0, False),
    ],
)
def test_dropout_masks_are_the_same_in_both_passes(
    changes: dict[str, Any], budget: float | None, right: bool
) -> None:
    """With a budget they are not: the reason why the launcher refuses it together with dropout.

    Inductor makes and compiles C++ for every kernel, so the layers are left with one product.
    """
    model = make_model(dtype="float32", lora_dropout=0.3, target_modules=["q_proj"], **changes)
    for layer in decoder_layers(model):
        layer.self_attn = OneProduct(layer.self_attn.q_proj)
        layer.mlp, layer.input_layernorm, layer.post_attention_layernorm = (torch.nn.Identity(),) * 3
    compile_model(model, budget=budget, backend="inductor")
    assert (error_of_slope(model) < 0.05) == right
