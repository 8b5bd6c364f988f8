"""Experts in 4 bits train as those in 16 do, hold the bytes that are planned, and need what is done."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as torch_parametrize
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from launcher.models.inspect import inspect_config
from launcher.training import build
from launcher.training.loading.base_folder import find_base
from launcher.training.loading.quantised_experts import (
    NEEDED_BY,
    as_parameters,
    quantise_all,
    quantised_parameters,
)
from launcher.training.loading.skeleton import Skeleton
from launcher.training.products.sliced_experts import use_sliced_experts
from planner.memory.decoder.live_bytes import at
from planner.models import storage
from planner.models.catalog import resolve_model
from planner.setup.training_setup import TrainingSetup
from tests.each import for_each

from .like_cuda import forget_replays, like_cuda
from .live_bytes import LiveBytes, constants_of
from .real_steps import first_step, measure
from .small_models import LAYERS, load_model, spec_of
from .test_live_bytes import largest, make_setup, predict
from .test_weights import loaded, nbytes

pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
SMALL |= {"vocab_size": 64, "intermediate_size": 192, "moe_intermediate_size": 96}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUTED = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**SMALL, **ROUTED, "head_dim": 32},
    "mixtral": {**SMALL, **ROUTED},
    "glm4_moe": {
        **SMALL,
        **ROUTED,
        "head_dim": 32,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {**SMALL, **ROUTED, "head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]},
}
QLORA = TrainingSetup(model="m", max_length=64, lora_r=4, dtype="float32", experts="4bit")
STACKS = ("gate_up_proj", "down_proj")
ROUTERS_COSINE = 0.8
"""A router's gradient is what experts differ by, and a token between two of them goes to the other one once
they are rounded: 0.86 to 0.97 over three draws of tokens, where all other adapters have 0.95 and more.
"""


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CONFIGS[family])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def adapted(model: Any, family: str, *, experts: bool) -> Any:
    """With adapters that are not zero, the same whatever the base is."""
    torch.manual_seed(1)
    targets = "all-linear" if experts and family != "gpt_oss" else list(ATTENTION)
    stacks = [f"mlp.experts.{name}" for name in STACKS] if experts and family == "gpt_oss" else None
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, target_parameters=stacks, task_type="CAUSAL_LM"
    )
    with as_parameters(model):
        found = get_peft_model(model, config)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return found.train()


def gradients(model: Any, *, checkpointed: bool) -> dict[str, torch.Tensor | None]:
    """Of the second of two passes: what the first leaves behind would be seen."""
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(2)
    ids = torch.randint(0, SMALL["vocab_size"], (4, 64))
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def rounded(model: Any) -> Any:
    """The same with experts of the values that 4 bits leave them, in 32 bits."""
    held = copy.deepcopy(model)
    quantise_all(held, build.quantization_config(QLORA))
    for module, name, _ in list(quantised_parameters(held)):
        weight = torch.nn.Parameter(getattr(module, name), requires_grad=False)
        torch_parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        module.register_parameter(name, weight)
    return held


GRADIENTS = [
    *((family, True, checkpointed) for family in CONFIGS for checkpointed in (True, False)),
    *(("qwen3_moe", False, checkpointed) for checkpointed in (True, False)),
    ("mixtral", False, True),
]


@pytest.mark.parametrize(("family", "experts", "checkpointed"), GRADIENTS)
def test_each_adapter_gets_the_gradient_of_16_bits(family: str, experts: bool, checkpointed: bool) -> None:
    base = model_of(family)
    held = copy.deepcopy(base)
    quantise_all(held, build.quantization_config(QLORA))
    stacks = {(type(module).__name__, name) for module, name, _ in quantised_parameters(held)}
    assert {name for _, name in stacks} == set(STACKS)
    got = gradients(adapted(held, family, experts=experts), checkpointed=checkpointed)
    same = gradients(adapted(rounded(base), family, experts=experts), checkpointed=checkpointed)
    wide = gradients(adapted(base, family, experts=experts), checkpointed=checkpointed)
    assert got.keys() == same.keys() == wide.keys()
    assert any("experts" in name for name in got) == experts
    for name, gradient in got.items():
        assert gradient is not None, name
        assert torch.allclose(gradient, same[name], rtol=1e-3, atol=1e-7), name
        other = wide[name]
        assert other is not None
        least = ROUTERS_COSINE if "mlp.gate" in name else 0.94
        assert cosine_similarity(gradient.flatten(), other.flatten(), dim=0) >= least, name
    assert (torch_parametrize._cache_enabled, len(torch_parametrize._cache)) == (0, 0)


@contextlib.contextmanager
def one_expert_a_slice() -> Iterator[None]:
    """Small models have all of their experts in one slice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "SLICE_BYTES", 1)
        forget_replays()
        yield
    forget_replays()


@for_each([("gpt_oss", True), ("qwen3_moe", False)])
def test_experts_in_slices_have_the_gradients_of_whole_ones(case: tuple[str, bool]) -> None:
    """To the bit: what is multiplied is the same. Rows are whole blocks of constants, which bitsandbytes'
    kernel of the CPU wants.
    """
    family, checkpointed = case
    with pytest.MonkeyPatch.context() as patch, one_expert_a_slice():
        patch.setitem(CONFIGS[family], "moe_intermediate_size", 128)
        models = []
        for _ in range(2):
            held = model_of(family)
            quantise_all(held, build.quantization_config(QLORA))
            models.append(adapted(held, family, experts=False))
        use_sliced_experts(models[1])
        whole, sliced = (gradients(model, checkpointed=checkpointed) for model in models)
    assert whole.keys() == sliced.keys()
    for name, gradient in sliced.items():
        assert gradient is not None
        assert torch.equal(gradient, whole[name]), name


def held_by_upstream(model: Any) -> None:
    for module in list(model.modules()):
        for name in STACKS:
            if name in module._parameters:
                replace_parameter_4bit(module, name, compress_statistics=True)


def test_peft_still_adapts_no_experts_that_are_in_4_bits_already() -> None:
    """Or `as_parameters` can go."""
    model = model_of("qwen3_moe")
    held_by_upstream(model)
    found = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert not [name for name, _ in found.named_parameters() if "experts" in name and "lora" in name]


def test_peft_still_leaves_its_adapter_in_the_chain_of_what_is_in_4_bits() -> None:
    """Or QuantisedParamWrapper need not take it out."""
    model = get_peft_model(model_of("qwen3_moe"), LoraConfig(r=4, target_modules="all-linear"))
    held_by_upstream(model)
    ids = torch.zeros((1, 8), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(input_ids=ids)
        with pytest.raises(RuntimeError, match="floating point"):
            model(input_ids=ids)


def test_torch_and_peft_still_use_the_weight_without_its_adapter() -> None:
    """Or QuantisedParamWrapper need not see to what is remembered."""
    from peft.tuners.lora import layer

    class Proxy(layer._LoraParameterProxy):  # type: ignore[misc]
        """The adapter's, of a class that PEFT takes out again."""

        def __init__(self, *factors: Any) -> None:
            super().__init__(None)
            self.factors = factors

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            left, right, scaling = self.factors
            return torch.baddbmm(weight, left, right, alpha=scaling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "_LoraFactorsProxy", Proxy)
        model = get_peft_model(model_of("qwen3_moe"), LoraConfig(r=4, target_modules="all-linear"))
        held_by_upstream(model)
        got = gradients(model.train(), checkpointed=False)
    assert [name for name, gradient in got.items() if gradient is None]


def test_the_releases_that_need_it_are_those_that_are_here() -> None:
    """What is newer has been looked at: by the three tests above."""
    assert {name: version(name).partition("+")[0] for name in NEEDED_BY} == NEEDED_BY


def setup_of(**knobs: Any) -> TrainingSetup:
    return make_setup("qwen3_moe", method="qlora", experts="4bit", **knobs)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_hold_what_is_planned(family: str, double: bool) -> None:
    setup = dataclasses.replace(setup_of(bnb_4bit_use_double_quant=double), model=family)
    model = load_model(family, setup)
    expected = loaded(setup, spec_of(family), "expandable_segments")
    linears = [p for p in model.parameters() if hasattr(p, "quant_state")]
    held = [(chain.original, chain[0].quant_state) for _, _, chain in quantised_parameters(model)]
    assert len(held) == 2 * LAYERS
    packed = nbytes(linears) + nbytes(original for original, _ in held)
    assert expected.quantized_bytes == packed
    states = [*(p.quant_state for p in linears), *(state for _, state in held)]
    assert expected.constants_bytes == sum(nbytes(constants_of(state)) for state in states)
    assert expected.unquantized_bytes == nbytes(model.parameters()) - packed


SLICED_EXPERTS = {"target_modules": ATTENTION, "experts_matmul": "sliced"}
HELD_CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"target_modules": ATTENTION}),
    ("qwen3_moe", {"gradient_checkpointing": False}),
    # Mixtral weights what experts return in float32, the other in the load dtype.
    ("mixtral", {"target_modules": ATTENTION}),
    ("qwen3_moe", {"target_modules": ATTENTION, "experts": "16bit"}),
    ("qwen3_moe", SLICED_EXPERTS),
    ("qwen3_moe", {**SLICED_EXPERTS, "gradient_checkpointing": False}),
]


@for_each(HELD_CASES)
def test_a_step_holds_what_is_planned(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Live bytes of a real step. Of the forward pass with autocast on the CPU: a sum stays in bfloat16 there
    that is float32 on a GPU, so what is planned of it is larger.
    """
    family, knobs = case
    setup = setup_of().replace(model=family, **knobs)
    with like_cuda(), one_expert_a_slice():
        measured = measure(first_step(family, setup, tmp_path))
        timeline, spec, tables, masks = predict(family, setup)
        tokens, scores = timeline.shape.tokens, timeline.shape.scores
        kept = timeline._kept_below(spec.num_hidden_layers) + at(timeline.final_norm.saved, tokens, scores)
        over = tables if setup.gradient_checkpointing else tables - masks
        assert kept + over == pytest.approx(measured.saved_bytes, rel=0.005), measured.kept
        backward = largest(timeline, "backward of") + over
        assert backward == pytest.approx(measured.backward_bytes, rel=0.005)
        assert largest(timeline, "forward of") + tables == pytest.approx(
            measured.forward_bytes, rel=0.08, abs=10**6
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "qwen3_moe"
    model_of("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_model_that_is_loaded_by_layer_is_the_one_that_is_loaded_whole(base: Path) -> None:
    config = build.quantization_config(QLORA)
    assert config is not None
    cpu = torch.device("cpu")
    with LiveBytes() as live:
        model = build.load_model(QLORA, str(base), device=cpu, allow_download=False)
    whole = build.load_model(QLORA.replace(experts="16bit"), str(base), device=cpu, allow_download=False)
    quantise_all(whole, config)
    assert not live.largest_bytes > 8 * 192 * 128 * 4  # a stack of gate and up, in float32
    assert (model.is_loaded_in_4bit, model.training) == (True, whole.training)
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, whole))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
        assert value.dtype == theirs[name].dtype
        assert value.requires_grad == theirs[name].requires_grad, name
    for (module, name, _), (other, _, _) in zip(
        quantised_parameters(model), quantised_parameters(whole), strict=True
    ):
        assert torch.equal(getattr(module, name), getattr(other, name))


def test_experts_stored_in_mxfp4_are_loaded_as_what_they_stand_for(tmp_path: Path) -> None:
    """A folder as gpt-oss is published, and one of the same weights in 16 bits: the same model, in 4 bits or
    not, with one stack at a time in more than it is stored in.
    """
    model = model_of("gpt_oss").to(torch.bfloat16)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith(STACKS)]:
        experts, inputs, outputs = tensors[name].shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 123, blocks.shape[:3], dtype=torch.uint8)
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        assert tensors[name].shape == (experts, inputs, outputs)
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    config = model.config.to_dict()
    told = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    for folder, held, own in (("plain", tensors, {}), ("mxfp4", stored, {"quantization_config": told})):
        (tmp_path / folder).mkdir()
        save_file(held, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps({**config, **own}))
    for setup in (
        QLORA,
        QLORA.replace(experts="16bit"),
        TrainingSetup(model="m", max_length=64, method="lora"),
    ):
        with LiveBytes() as live:
            ours, theirs = (
                build.load_model(
                    setup, str(tmp_path / name), device=torch.device("cpu"), allow_download=False
                )
                for name in ("mxfp4", "plain")
            )
        assert live.largest_bytes <= 4 * 128 * 384 * 4  # a stack of gate and up, in float32
        assert not hasattr(ours.config, "quantization_config") or setup.method == "qlora"
        found, expected = (dict(one.named_parameters()) for one in (ours, theirs))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
            assert value.dtype == expected[name].dtype, name
    assert resolve_model(str(tmp_path / "mxfp4"), inspector=inspect_config).checkpoint is None


@pytest.mark.parametrize("rounded", [True, False])
def test_a_merge_adds_to_what_a_run_multiplied_by_or_to_the_original(base: Path, rounded: bool) -> None:
    skeleton = Skeleton(
        base=find_base(str(base), allow_download=False),
        dtype=torch.float32,
        quantization=build.quantization_config(QLORA) if rounded else None,
        device=torch.device("cpu"),
        quantizes_experts=True,
    )
    setup = QLORA if rounded else QLORA.replace(experts="16bit")
    model = build.load_model(setup, str(base), device=torch.device("cpu"), allow_download=False)
    name = "model.layers.1.mlp.experts.down_proj"
    group = next(group for group in skeleton.groups if name in group.parameters)
    assert skeleton.is_quantized(name) == rounded
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert torch.equal(skeleton.load(group)[name], experts.down_proj)
    skeleton.close()
