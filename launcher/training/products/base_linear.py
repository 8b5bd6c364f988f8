"""The frozen base's linear layers with their products in 8 bits: the gradient's alone, or both passes'.

The layer keeps its weight as it is held (bitsandbytes' 4 bits, or 16 bits); adapters around it do not know.
A gradient of the weight is never asked for: the base is frozen, so that nothing of the 8-bit copies is kept
between the passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from launcher.training.products.nf4 import Constants, weight_in_e4m3
from launcher.training.products.scaled import in_rows, row_scales, scaled_product, to_e4m3
from planner.models.storage import EIGHT_BIT_MULTIPLE, EXACT_ENDS

FP8 = "fp8"


class EightBitLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]  # bitsandbytes has no types
    """A 4-bit linear layer with 8-bit products. `eight_bit_scales` has a scale for each row of the weight."""

    forward_in_8bit: bool
    eight_bit_scales: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As bitsandbytes': in the dtype of the input."""
        state = self.weight.quant_state
        inputs = x.to(self.compute_dtype)
        made = _Product.apply(
            inputs, self.weight, Constants.of(state), self.eight_bit_scales, state, _forward_in_8bit(self)
        )
        if self.bias is not None:
            made = made + self.bias.to(made.dtype)
        return made.to(x.dtype)


class EightBitLinear(nn.Linear):  # type: ignore[misc]  # torch has no types here
    """A 16-bit linear layer with 8-bit products."""

    forward_in_8bit: bool
    eight_bit_scales: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As torch's, in the dtype of the weight."""
        inputs = x.to(self.weight.dtype)
        made = _Product.apply(inputs, self.weight, None, self.eight_bit_scales, None, _forward_in_8bit(self))
        return made if self.bias is None else made + self.bias.to(made.dtype)


def _forward_in_8bit(module: EightBitLinear4bit | EightBitLinear) -> bool:
    """Not in evaluation: an adapter is judged, and used, with exact products."""
    return module.forward_in_8bit and module.training


class _Product(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """x times the transpose of a frozen weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        constants: Constants | None,
        scales: torch.Tensor,
        state: Any,
        in_8bit: bool,
    ) -> torch.Tensor:
        ctx.constants, ctx.columns = constants, x.shape[-1]
        ctx.save_for_backward(weight, scales)
        if not in_8bit:
            if constants is None:
                return nn.functional.linear(x, weight)
            return bnb.matmul_4bit(x, weight, quant_state=state)
        rows, row_scale = in_rows(x.reshape(-1, x.shape[-1]))
        right = _weight(weight, constants, scales, x.shape[-1], transposed=False)
        made = scaled_product(rows, row_scale, right, scales, x.dtype)
        return made.view(*x.shape[:-1], made.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        # The weight's scales are those of the dimension that is summed over here: they go into the gradient.
        flat = grad.reshape(-1, grad.shape[-1]).to(torch.float32) * scales.t()
        rows, row_scale = in_rows(flat)
        right = _weight(weight, ctx.constants, scales, ctx.columns, transposed=True)
        ones = torch.ones((ctx.columns, 1), dtype=torch.float32, device=grad.device)
        made = scaled_product(rows, row_scale, right, ones, grad.dtype)
        return made.view(*grad.shape[:-1], made.shape[-1]), None, None, None, None, None


def _weight(
    weight: torch.Tensor, constants: Constants | None, scales: torch.Tensor, columns: int, *, transposed: bool
) -> torch.Tensor:
    if constants is not None:
        return weight_in_e4m3(weight, constants, scales, columns, transposed=transposed)
    eight = to_e4m3(weight.to(torch.float32) / scales)
    return eight.t().contiguous() if transposed else eight


@dataclass(frozen=True, kw_only=True, slots=True)
class Changed:
    """Which layers compute in 8 bits, and the names of those whose shape has no such product."""

    changed: tuple[str, ...]
    refused: tuple[str, ...]


def use_eight_bit(layers: Sequence[tuple[str, nn.Module]], base_matmul: str) -> Changed:
    """Have the frozen linear layers within decoder layers compute in 8 bits; adapters' own are left alone.

    `layers` are all decoder layers, in order: at both ends the forward pass is left in 16 bits.
    """
    changed, refused = [], []
    for index, (prefix, layer) in enumerate(layers):
        inner = EXACT_ENDS <= index < len(layers) - EXACT_ENDS
        for name, module in layer.named_modules():
            if not _is_frozen_base(name, module):
                continue
            full = f"{prefix}.{name}"
            if module.in_features % EIGHT_BIT_MULTIPLE or module.out_features % EIGHT_BIT_MULTIPLE:
                refused.append(full)
                continue
            _change(module, forward=inner and base_matmul == FP8)
            changed.append(full)
    return Changed(changed=tuple(changed), refused=tuple(refused))


def _is_frozen_base(name: str, module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or any(part.startswith("lora_") for part in name.split(".")):
        return False
    return type(module) in (nn.Linear, bnb.nn.Linear4bit) and not module.weight.requires_grad


def _change(module: Any, *, forward: bool) -> None:
    weight = module.weight
    with torch.no_grad():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(weight, weight.quant_state)
        else:
            values = weight
        module.register_buffer("eight_bit_scales", row_scales(values), persistent=False)
    module.forward_in_8bit = forward
    module.__class__ = EightBitLinear4bit if isinstance(module, bnb.nn.Linear4bit) else EightBitLinear


@contextmanager
def plain_products(layer: nn.Module) -> Iterator[None]:
    """A layer's products as they were, within."""
    changed = [one for one in layer.modules() if isinstance(one, EightBitLinear4bit | EightBitLinear)]
    found: list[Any] = [(one, type(one)) for one in changed]
    for one, kind in found:
        one.__class__ = bnb.nn.Linear4bit if kind is EightBitLinear4bit else nn.Linear
    try:
        yield
    finally:
        for one, kind in found:
            one.__class__ = kind


def use_plain(layer: nn.Module) -> None:
    """Have a layer's products computed as they were from here on."""
    for one in layer.modules():
        if isinstance(one, EightBitLinear4bit | EightBitLinear):
            kind: Any = bnb.nn.Linear4bit if isinstance(one, EightBitLinear4bit) else nn.Linear
            one.__class__ = kind
            del one._buffers["eight_bit_scales"]
