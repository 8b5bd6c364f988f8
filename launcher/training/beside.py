"""What is trained beside an adapter, held as it has to be: TRL casts all that is trained on a quantised base
to bfloat16 (sft_trainer.py, "_is_quantized_model").
"""

from __future__ import annotations

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper


def hold_beside(model: torch.nn.Module) -> None:
    """Hold whole modules in the base's dtype, which what flows through them has, and biases and single rows
    of the embedding in float32: a step of theirs is smaller than 16 bits can say.

    Values come from the base, since those of the cast have lost theirs.
    """
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
        elif isinstance(getattr(module, "bias", None), torch.nn.Parameter) and module.bias.requires_grad:
            module.bias.data = module.bias.data.float()


def _as_original(wrapper: ModulesToSaveWrapper) -> None:
    originals = dict(wrapper.original_module.named_parameters())
    for copy in wrapper.modules_to_save.values():
        for name, parameter in copy.named_parameters():
            if parameter.dtype != originals[name].dtype:
                parameter.data = originals[name].detach().clone()
