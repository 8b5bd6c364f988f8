"""Products with experts in 4 bits that dequantise a few of them at a time, in both passes.

bitsandbytes dequantises a whole stack where it is read, and what a product keeps for backward is that copy
(launcher/training/loading/quantised_experts.py). Where no adapter is folded into it nothing else needs it:
here a stack that is read is a reference to its 4 bits, a product with it dequantises slice by slice, and its
backward pass does so again, as bitsandbytes' own linear layers do. The numbers are those of whole stacks; an
expert's product is a matrix product of its own. Each product reads how many tokens every expert has, for
which the host waits.

transformers multiplies with experts by `_grouped_mm` (5.23, integrations/moe.py), which is where a reference
is recognised. Experts that are multiplied with otherwise fail on it, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.training.loading.quantised_experts import quantised_parameters
from planner.models.storage import expert_slices

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertStack:
    """A stack of experts' weights in 4 bits: `packed` two elements a byte, and bitsandbytes' state of them.
    Seen `transposed`, the last two dimensions change places.
    """

    packed: torch.Tensor
    state: QuantState
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is dequantised to."""
        found: torch.dtype = self.state.dtype
        return found

    @property
    def width(self) -> int:
        """Features that a product with it makes."""
        return int(self.state.shape[1 if self.transposed else 2])

    def transpose(self, first: int, second: int) -> ExpertStack:
        """As a tensor's, of the last two dimensions.

        Raises:
            ValueError: other dimensions.
        """
        if {first, second} not in ({-2, -1}, {1, 2}):
            raise ValueError(f"dimensions {first} and {second} of a stack of experts cannot change places")
        return ExpertStack(packed=self.packed, state=self.state, transposed=not self.transposed)

    def constants(self) -> torch.Tensor:
        """bitsandbytes' constants of all of its blocks, in fp32."""
        from bitsandbytes.functional import dequantize_blockwise

        state = self.state
        found: torch.Tensor = state.absmax
        if state.nested:
            found = dequantize_blockwise(state.absmax, state.state2)
            found += state.offset
        return found

    def slices(self) -> Iterator[range]:
        """The experts that are dequantised together, slice by slice."""
        experts, *shape = self.state.shape
        first = 0
        for count in expert_slices(experts, shape[0] * shape[1], self.dtype.itemsize):
            yield range(first, first + count)
            first += count

    def dequantised(self, experts: range, constants: torch.Tensor) -> torch.Tensor:
        """Weights of some experts, a stack of them."""
        from bitsandbytes.functional import dequantize_4bit

        shape, block = self.state.shape[1:], self.state.blocksize
        elements = shape[0] * shape[1]
        start, end = experts.start * elements, experts.stop * elements
        own = _plain_state(self.state, constants[start // block : -(-end // block)], end - start)
        packed = self.packed.reshape(-1, 1)[start // 2 : -(-end // 2)]
        made: torch.Tensor = dequantize_4bit(packed, own).view(len(experts), *shape)
        return made.transpose(1, 2) if self.transposed else made


def _plain_state(state: QuantState, constants: torch.Tensor, elements: int) -> QuantState:
    """The state of a slice. Its rows are blocks: on the CPU bitsandbytes 0.50.2 gives rows that are no whole
    blocks the constants of others (findings/cpu-dequantise-takes-other-constants.sh).
    """
    from bitsandbytes.functional import QuantState

    rows, rest = divmod(elements, state.blocksize)
    return QuantState(
        absmax=constants,
        shape=torch.Size((rows, state.blocksize) if not rest else (1, elements)),
        dtype=state.dtype,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        code=state.code,
    )


class _Product(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Rows, sorted by expert, times their experts' weights; `ends` is where each expert's rows end."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, stack: ExpertStack, ends: list[int]) -> torch.Tensor:
        ctx.stack, ctx.ends = stack, ends
        return _multiplied(rows, stack, ends, stack.width)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        back: ExpertStack = ctx.stack.transpose(-2, -1)
        return _multiplied(grad, back, ctx.ends, back.width), None, None


def _multiplied(rows: torch.Tensor, stack: ExpertStack, ends: list[int], width: int) -> torch.Tensor:
    made = rows.new_empty((rows.shape[0], width))
    constants = stack.constants()
    for experts in stack.slices():
        weights = stack.dequantised(experts, constants)
        for expert, weight in zip(experts, weights, strict=True):
            start, end = ends[expert - 1] if expert else 0, ends[expert]
            if start < end:
                torch.mm(rows[start:end], weight, out=made[start:end])
        # The next slice takes its place.
        del weights, weight
    return made


_whole: list[Any] = []
"""transformers' own grouped product, once it was replaced."""


def use_sliced_experts(model: torch.nn.Module) -> None:
    """Have products with a model's stacks of experts in 4 bits dequantise a few experts at a time. Stacks
    with adapters folded into them are left as they are.
    """
    from transformers.integrations import moe

    for _, _, chain in list(quantised_parameters(model)):
        chain[0].__class__ = _reading_class()
    if not _whole:
        _whole.append(moe._grouped_mm)
        moe._grouped_mm = _grouped_mm


def _grouped_mm(rows: torch.Tensor, weight: Any, offs: torch.Tensor) -> torch.Tensor:
    """transformers' grouped product, for stacks that are references as well."""
    if not isinstance(weight, ExpertStack):
        found: torch.Tensor = _whole[0](rows, weight, offs=offs)
        return found
    made: torch.Tensor = _Product.apply(rows.to(weight.dtype), weight, offs.tolist())
    return made


_readings: list[type[Any]] = []
"""The class, made where bitsandbytes is first needed."""


def _reading_class() -> type[Any]:
    if not _readings:
        import bitsandbytes.nn.parametrize as bnb

        class ReferredExperts(bnb.Bnb4bitParametrization):  # type: ignore[misc]
            """Reads a stack as a reference to its 4 bits."""

            def forward(self, quantized_param: torch.Tensor) -> ExpertStack:
                """The reference."""
                return ExpertStack(packed=quantized_param, state=self.quant_state)

        _readings.append(ReferredExperts)
    return _readings[0]
