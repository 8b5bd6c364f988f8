"""The FLOP count against what torch counts while the real layers of transformers and PEFT run."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from launcher.training import build
from planner.models.parameter import Parameter
from planner.models.spec import LayerSpec, ModelSpec
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.flops import matrix_flops

from .small_models import load_model, spec_of

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 3, 64, 160, 4, 2, 512


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=LAYERS,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            vocab_size=VOCABULARY,
            attn_implementation="eager",
        )
    )


def spec(real: LlamaForCausalLM) -> ModelSpec:
    classes = {name: type(module).__name__ for name, module in real.named_modules()}
    parameters = []
    for name, tensor in real.named_parameters():
        if ".layers." in name and ".layers.0." not in name:
            continue
        parameters.append(
            Parameter(
                name=name.replace(".layers.0.", ".layers.*."),
                module_class=classes[name.rsplit(".", 1)[0]],
                shape=tuple(tensor.shape),
                count=LAYERS if ".layers." in name else 1,
            )
        )
    layer = LayerSpec(
        indices=tuple(range(LAYERS)),
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        intermediate_size=INTERMEDIATE,
        activation="silu",
    )
    return ModelSpec(
        id="tiny",
        hub_id="tiny",
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        max_position_embeddings=2048,
        parameters=tuple(parameters),
        layers=(layer,),
        tied_embeddings=False,
        default_attn_implementation="eager",
        source="test",
    )


def counted(setup: TrainingSetup, real: PreTrainedModel) -> int:
    """FLOPs of the decoder's forward and backward; the head is left out, TRL runs its own."""
    network: torch.nn.Module = real
    if setup.uses_lora:
        network = get_peft_model(real, build.lora_config(setup))
    # Without it the first layer's frozen weights have no input gradient; TRL and transformers ask for it.
    real.enable_input_require_grads()
    if setup.gradient_checkpointing:
        # Early stop leaves out the last matmul of each recompute, which no saved tensor needs.
        real.gradient_checkpointing_enable({"use_reentrant": False})
    network.train()
    tokens = torch.randint(real.config.vocab_size, (setup.per_device_train_batch_size, setup.max_length))
    with FlopCounterMode(display=False) as counter, torch.utils.checkpoint.set_checkpoint_early_stop(False):
        real.model(tokens).last_hidden_state.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "lora", "lora_r": 8},
        {"method": "lora", "lora_r": 4, "target_modules": ("q_proj", "v_proj")},
        {"method": "full"},
    ],
    ids=["all-linear", "q and v", "full"],
)
def test_layers_adapter_and_attention_are_counted_to_the_operation(
    knobs: dict[str, object], gradient_checkpointing: bool
) -> None:
    setup = TrainingSetup.from_dict(
        {"model": "tiny", "max_length": 32, "per_device_train_batch_size": 2}
        | {"gradient_checkpointing": gradient_checkpointing, "attn_implementation": "eager"}
        | knobs
    )
    real = model()
    flops = matrix_flops(TrainingRun(setup=setup, model=spec(real)))
    expected = flops.layers + flops.experts + flops.adapter + flops.attention
    # The rotation's angles are a batched matmul of its own: positions by frequencies, once a forward.
    rotary = 2 * setup.max_length * (HIDDEN // HEADS // 2)
    assert counted(setup, real) == pytest.approx(expected + rotary, rel=1e-3)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3_moe", "all-linear"),
        ("mixtral", "all-linear"),
        ("mixtral", ATTENTION),
        ("qwen3_moe", (*ATTENTION, "gate_proj", "up_proj", "down_proj")),
    ],
)
def test_adapters_of_experts_are_counted_as_peft_folds_them(
    family: str, targets: str | tuple[str, ...], gradient_checkpointing: bool
) -> None:
    """Torch counts the eager loop over experts, which multiplies what grouped products do."""
    setup = TrainingSetup.from_dict(
        {"model": family, "max_length": 32, "per_device_train_batch_size": 2, "method": "lora", "lora_r": 8}
        | {"gradient_checkpointing": gradient_checkpointing, "attn_implementation": "eager"}
        | {"target_modules": targets if isinstance(targets, str) else list(targets)}
    )
    real = load_model(family, setup)
    real.set_attn_implementation("eager")
    real.set_experts_implementation("eager")
    flops = matrix_flops(TrainingRun(setup=setup, model=spec_of(family)))
    expected = flops.layers + flops.experts + flops.adapter + flops.attention
    rotary = 2 * setup.max_length * (64 // 2)
    assert counted(setup, real) == pytest.approx(expected + rotary, rel=1e-3)
