"""Weights that are stored in 4 or 8 bits, read as the plain weights that they stand for.

In 4 bits bitsandbytes stores a weight's packed elements and its constants as tensors of their own, and the
rest as JSON in one more (bitsandbytes functional.py, QuantState.as_dict with packed=True); in 8 bits a
constant for each output, `SCB`, and the layout, which is of rows (nn/modules.py,
Linear8bitLt._save_to_state_dict).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launcher.training.loading.stored_tensor import StoredTensor
from planner.base.errors import InputError

if TYPE_CHECKING:
    import torch

_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
SCALES, LAYOUT = ".SCB", ".weight_format"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def as_plain(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint with each quantised weight as one of its true shape, and no constants.

    Raises:
        InputError: a weight's description cannot be read.
    """
    parts: dict[str, tuple[str, ...]] = {}
    for name in tensors:
        found = _STATE.fullmatch(name)
        if found is not None:
            weight = found["weight"]
            parts[weight] = (name, *(one for one in _constants(weight) if one in tensors))
    scaled = [name for name in tensors if name.endswith(SCALES)]
    eight = {f"{name.removesuffix(SCALES)}.weight": name for name in scaled}
    constants = {one for names in parts.values() for one in names} | set(scaled)
    constants |= {f"{name.removesuffix(SCALES)}{LAYOUT}" for name in scaled}
    plain = {}
    for name, tensor in tensors.items():
        if name in parts:
            plain[name] = _described(name, tensor, parts[name], tensors)
        elif name in eight:
            scales = tensors[eight[name]]
            held = tensor.size_bytes + scales.size_bytes
            plain[name] = replace(tensor, dtype="F16", held_bytes=held, parts=((eight[name], scales.file),))
        elif name not in constants:
            plain[name] = tensor
    return plain


def _constants(weight: str) -> tuple[str, ...]:
    return tuple(f"{weight}.{end}" for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"))


def _described(
    name: str, packed: StoredTensor, parts: tuple[str, ...], tensors: Mapping[str, StoredTensor]
) -> StoredTensor:
    from safetensors import safe_open

    state = tensors[parts[0]]
    with safe_open(state.file, framework="np") as opened:
        told = bytes(opened.get_tensor(parts[0]))
    try:
        values = json.loads(told)
        shape, dtype = tuple(int(size) for size in values["shape"]), _DTYPES[values["dtype"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{state.file}: {parts[0]} does not describe a weight") from error
    held = packed.size_bytes + sum(tensors[one].size_bytes for one in parts)
    files = {one: tensors[one].file for one in parts}
    return replace(packed, shape=shape, dtype=dtype, held_bytes=held, parts=tuple(files.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class DequantisedSlice:
    """What the loader takes for a slice of safetensors: a weight that is dequantised where it is read.

    It comes in `dtype`, whatever the model was in that it was made from, as a run multiplies by it.
    """

    name: str
    tensor: StoredTensor
    packed: Any
    constants: Mapping[str, Any]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """The weight's shape."""
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        """The dtype that the checkpoint names, as safetensors would."""
        return self.tensor.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        packed = self.packed[...]
        if next(iter(self.constants)).endswith(SCALES):
            (scales,) = self.constants.values()
            return dequantised_from_int8(packed, scales[...], self.dtype)[index]
        from bitsandbytes.functional import QuantState, dequantize_4bit

        prefix = len(self.name) + 1
        told = {name[prefix:]: value[...] for name, value in self.constants.items()}
        state = QuantState.from_dict(told, device=packed.device)
        state.dtype = self.dtype
        found: torch.Tensor = dequantize_4bit(packed, state)[index]
        return found


def dequantised_from_int8(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights in 8 bits as the gradient of their inputs is made of (autograd/_functions.py, MatMul8bitLt)."""
    return packed.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
