"""bitsandbytes' quantisation constants as parameters, so that FSDP2 shards and gathers them with the weights.

In bitsandbytes they are no parameters but tensors of the QuantState, whole on every rank: 0.0625 bytes a
parameter, 0.0159 with double quantisation (one uint8 for 64 weights), which for 70B is 1.0 GiB. They are
gathered as bits of the layer's dtype, as the packed weights are, and never computed with in it.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch

NAME = "absmax_shards"
"""The parameter's name in its Linear4bit."""


def share_constants(layer: torch.nn.Module) -> None:
    """Make parameters of the constants of a layer's 4-bit weights, in the dtype in which those are stored.

    Constants that do not fill whole elements of that dtype stay as they are.
    """
    quantised = [module for module in layer.modules() if isinstance(module, bnb.nn.Linear4bit)]
    shared: list[tuple[torch.nn.Module, Any, torch.dtype]] = []
    for module in quantised:
        state, storage = module.weight.quant_state, module.weight.quant_storage
        if not storage.is_floating_point or state.absmax.numel() * state.absmax.itemsize % storage.itemsize:
            continue
        constants = torch.nn.Parameter(state.absmax.view(storage).view(-1, 1), requires_grad=False)
        module.register_parameter(NAME, constants)
        shared.append((module, state, state.absmax.dtype))
        # Until FSDP2 gathers them the state holds nothing: the whole constants are freed.
        state.absmax = None
    if quantised:
        layer.register_forward_pre_hook(_Gathered(quantised, shared))


class _Gathered:
    """Puts a layer's 4-bit weights together before each forward pass: FSDP2 gathers tensors, bitsandbytes
    wants them with their QuantState, and that with its constants. Left to itself it makes a weight anew in
    each module (nn/modules.py, fix_4bit_weight_quant_state_from_module), where torch's compiler stops.

    The backward pass reads the same QuantState (bitsandbytes/autograd/_functions.py, MatMul4Bit): FSDP2
    gathers a parameter into the storage that it had in the forward pass, so what was set is good then too.
    """

    def __init__(self, quantised: list[Any], shared: list[tuple[torch.nn.Module, Any, torch.dtype]]) -> None:
        self._quantised, self._shared = quantised, shared

    def __call__(self, layer: torch.nn.Module, inputs: Any) -> None:
        """Set them: behind FSDP2's own hook, which comes first wherever it is registered."""
        for module in self._quantised:
            if getattr(module.weight, "quant_state", None) is None:
                module.weight.quant_state = module.quant_state
        for module, state, dtype in self._shared:
            state.absmax = getattr(module, NAME).view(-1).view(dtype)
