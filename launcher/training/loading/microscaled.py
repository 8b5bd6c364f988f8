"""Stacks of experts that are stored in MXFP4, read as the 16-bit weights that they stand for.

gpt-oss is published so (Open Compute Project, Microscaling Formats v1.0, 2023): of each stack `NAME_blocks`,
of shape (experts, outputs, groups, 16), has two 4-bit floats a byte, and `NAME_scales`, of shape (experts,
outputs, groups), an exponent for each 32 of them. transformers dequantises whole stacks by way of integers of
32 bits, three times the stack; here one expert at a time is, by its function, into a stack that is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.training.loading.stored_tensor import StoredTensor
from planner.base.errors import InputError

if TYPE_CHECKING:
    import torch

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_BYTES = 16
"""Packed elements that one scale is of."""


def microscaled_as_plain(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint with each stack in MXFP4 as one of its true shape (experts, inputs,
    outputs), and no blocks and scales.

    Raises:
        InputError: blocks without their scales, or of other shapes.
    """
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in tensors:
            continue
        if not name.endswith(BLOCKS):
            plain[name] = tensor
            continue
        stack = name.removesuffix(BLOCKS)
        scales = tensors.get(stack + SCALES)
        if scales is None or len(tensor.shape) != 4 or tensor.shape != (*scales.shape, BLOCK_BYTES):
            raise InputError(f"{tensor.file}: {name} has no scales that go with it")
        experts, outputs, groups, _ = tensor.shape
        plain[stack] = StoredTensor(
            file=tensor.file,
            shape=(experts, groups * BLOCK_BYTES * 2, outputs),
            dtype="BF16",
            held_bytes=tensor.size_bytes + scales.size_bytes,
            parts=((name, tensor.file), (stack + SCALES, scales.file)),
        )
    return plain


def is_microscaled(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor of `microscaled_as_plain` is stored in MXFP4."""
    return bool(tensor.parts) and tensor.parts[0][0] == name + BLOCKS


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroscaledSlice:
    """What the loader takes for a slice of safetensors: a stack that is dequantised where it is read, to
    `dtype`.
    """

    tensor: StoredTensor
    blocks: Any
    scales: Any
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """The stack's shape."""
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        """The dtype that it stands for, as safetensors names it."""
        return self.tensor.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        found = torch.empty(self.tensor.shape, dtype=self.dtype)
        for expert in range(self.tensor.shape[0]):
            one = slice(expert, expert + 1)
            found[one] = convert_moe_packed_tensors(self.blocks[one], self.scales[one], dtype=self.dtype)
        part: torch.Tensor = found[index]
        return part
