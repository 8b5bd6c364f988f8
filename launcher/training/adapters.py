"""What is trained beside a frozen base, as PEFT is told of it, and as it is held: TRL casts all that is
trained on a quantised base to bfloat16 (sft_trainer.py, "_is_quantized_model").
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from launcher.training.loading.tower import tower_paths
from planner.setup.training_setup import TrainingSetup

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from peft.utils.other import ModulesToSaveWrapper
    from transformers import PreTrainedModel, TrainingArguments


def lora_config(setup: TrainingSetup, model: PreTrainedModel | None = None) -> PeftConfig | None:
    """PEFT's configuration for qlora and lora, else None.

    Routers of `model` that are linear layers by descent and return more than their product get no adapter
    (Llama 4's): PEFT would take them with all the linear layers, and fail in the first step.
    """
    if not setup.uses_lora:
        return None
    from peft import LoraConfig

    if setup.peft_type != "lora":
        return _of_type(setup)
    targets, tokens = setup.target_modules, setup.trainable_token_indices
    saved, tied = _saved_whole(setup, model)
    return LoraConfig(
        r=setup.lora_r,
        lora_alpha=setup.alpha,
        lora_dropout=setup.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=setup.use_rslora,
        use_dora=setup.use_dora,
        bias=setup.bias,
        modules_to_save=saved,
        ensure_weight_tying=tied,
        trainable_token_indices=None if tokens is None else list(tokens),
        init_lora_weights=True if setup.init_lora_weights == "default" else "gaussian",
        task_type="CAUSAL_LM",
        exclude_modules=left_alone(model),
    )


def _of_type(setup: TrainingSetup) -> PeftConfig:
    """PEFT's configuration of another kind of adapter, at the setup's rank or size of blocks."""
    from peft import MissConfig, OFTConfig, VeraConfig

    targets = setup.target_modules
    common = {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": "CAUSAL_LM",
        "bias": "none",
    }
    if setup.peft_type == "vera":
        return VeraConfig(r=setup.lora_r, **common)
    if setup.peft_type == "miss":
        return MissConfig(r=setup.lora_r, **common)
    return OFTConfig(r=0, oft_block_size=setup.lora_r, **common)


def _saved_whole(setup: TrainingSetup, model: PreTrainedModel | None) -> tuple[list[str] | None, bool]:
    """modules_to_save for PEFT, and whether it is to keep two of them one tensor.

    Asked to keep embedding and head tied, PEFT wants the embedding named, and copies the head by itself where
    that is named too.
    """
    if not isinstance(setup.modules_to_save, tuple):
        return None, False
    if model is None or not model.config.get_text_config().tie_word_embeddings:
        return list(setup.modules_to_save), False
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return [name.rpartition(".")[2]], True


def left_alone(model: PreTrainedModel | None) -> list[str] | str | None:
    """A pattern of paths, or names: a vision tower, or routers; null for nothing."""
    from torch import nn

    tower = (
        []
        if model is None
        else [
            path
            for path in tower_paths(model.config)
            if any(isinstance(module, nn.Linear) for module in model.get_submodule(path).modules())
        ]
    )
    if tower:
        return "|".join(rf"{re.escape(path)}\..*" for path in tower)
    return _linear_routers(model) or None


def _linear_routers(model: PreTrainedModel | None) -> list[str]:
    from torch import nn

    found = [] if model is None else list(model.named_modules())
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in found
            if isinstance(module, nn.Linear) and type(module).__name__.endswith("Router")
        }
    )


def hold_beside(model: torch.nn.Module) -> None:
    """Hold whole modules in the base's dtype, which what flows through them has, and biases and single rows
    of the embedding in float32, as VeRA's vectors: a step of theirs is smaller than 16 bits can say.

    Values come from the base, since those of the cast have lost theirs.
    """
    import torch
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.vera.layer import VeraLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            _as_original(module)
        elif isinstance(module, TrainableTokensWrapper):
            if isinstance(module.token_adapter.base_layer, torch.nn.Linear):
                # TRL's head asks it for a bias, which PEFT's wrapper of a tied head does not have (0.21.2).
                module.register_parameter("bias", None)
        elif isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            for name, row in module.trainable_tokens_delta.items():
                row.data = module.weight.detach()[module.token_indices[name]].float()
        elif isinstance(module, VeraLayer):
            for vector in (*module.vera_lambda_b.values(), *module.vera_lambda_d.values()):
                vector.data = vector.data.float()
        elif isinstance(getattr(module, "bias", None), torch.nn.Parameter) and module.bias.requires_grad:
            module.bias.data = module.bias.data.float()


def _as_original(wrapper: ModulesToSaveWrapper) -> None:
    originals = dict(wrapper.original_module.named_parameters())
    for copy in wrapper.modules_to_save.values():
        for name, parameter in copy.named_parameters():
            if parameter.dtype != originals[name].dtype:
                parameter.data = originals[name].detach().clone()


def freeze_down(model: torch.nn.Module) -> None:
    """Freeze every lora_A, after TRL has cast what is trained: one that was frozen before would stay in
    float32 on a quantised base, at twice the bytes, and have its layer's input cast for it.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(requires_grad=False)


def lorafa_optimizer(model: PeftModel, args: TrainingArguments) -> torch.optim.Optimizer:
    """PEFT's optimizer for LoRA-FA, at the rate and decay of the arguments."""
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config["default"]
    made: torch.optim.Optimizer = create_lorafa_optimizer(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
    )
    return made
