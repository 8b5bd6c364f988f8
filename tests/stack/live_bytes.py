"""Live bytes of a program on the CPU, seen from torch's dispatcher: every storage, from birth to release.

What a kernel allocates inside one operation is not seen; the tests name where that matters.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import bitsandbytes  # noqa: F401 - registers its operations
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from launcher.models.tracing.recorder import IN_PLACE

aten, quantised = torch.ops.aten, torch.ops.bitsandbytes


def _attention(query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Its result lies in memory as the query does; the log of sums is float32 for every type.
    return torch.zeros_like(query), query.new_zeros(query.shape[:-1], dtype=torch.float32)


def _attention_backward(gradient: Any, *inputs: torch.Tensor, **_: Any) -> Any:
    return tuple(torch.zeros_like(each) for each in inputs[:3])


PRODUCTS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: lambda a, b: a.new_zeros(a.shape[0], b.shape[1]),
    aten.bmm.default: lambda a, b: a.new_zeros(*a.shape[:2], b.shape[2]),
    aten.addmm.default: lambda _, a, b, **__: a.new_zeros(a.shape[0], b.shape[1]),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    quantised.gemm_4bit.default: lambda x, _, shape, *__: x.new_zeros(*x.shape[:-1], shape[0]),
}
"""Zeros as large as what these give: half of a step's time is multiplying, and bytes are the same."""


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages that operations inside the context create and that are still held.

    Without `values` no product is computed, for programs in which no value says what is run.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), *, values: bool = True) -> None:
        super().__init__()
        self._instead = IN_PLACE | ({} if values else PRODUCTS)
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_operation = ""
        self.largest_bytes = 0
        self._sizes: dict[int, tuple[int, str]] = {}
        for tensor in known:
            self._watch(tensor, 0, "known")

    def reset_peak(self) -> None:
        """Start a new phase: the peak is what is live now."""
        self.peak_bytes = self.live_bytes

    def by_operation(self) -> Counter[str]:
        """Live bytes by the operation that made them."""
        counted: Counter[str] = Counter()
        for size, operation in self._sizes.values():
            counted[operation] += size
        return +counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._instead.get(func, func)(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor, tensor.untyped_storage().nbytes(), str(func))
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_operation = self.live_bytes, str(func)
        return result

    def _watch(self, tensor: torch.Tensor, size_bytes: int, operation: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = (size_bytes, operation)
            self.live_bytes += size_bytes
            self.largest_bytes = max(self.largest_bytes, size_bytes)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        size_bytes, _ = self._sizes.pop(key)
        self.live_bytes -= size_bytes


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers and bitsandbytes' quantisation constants of a model."""
    found = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found += constants_of(state)
        if getattr(parameter, "SCB", None) is not None:
            found.append(parameter.SCB)
    return found


def constants_of(state: Any) -> list[torch.Tensor]:
    """Tensors of a bitsandbytes QuantState, the nested one's included."""
    found = [state.absmax, state.code]
    if state.nested:
        found += [state.offset, state.state2.absmax, state.state2.code]
    return found
