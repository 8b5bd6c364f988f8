"""A recorder of storages: which are made and let go of, in order, seen from torch's dispatcher.

Tensors are fake (torch._subclasses.fake_tensor): they have shapes, dtypes and lifetimes, and no contents, so
that blocks run at their true widths in no memory. What a kernel allocates inside one operation is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

IN_PLACE = {
    torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default,
    torch.ops.aten.scatter.src: torch.ops.aten.scatter_.src,
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
}
"""What torch's backward formulas do in place unless a mode looks on (FunctionsManual.cpp,
areAnyTensorSubclassLike): into zeros that they have just made."""
TEMPORARIES = frozenset({torch.ops.aten._softmax_backward_data.default})
"""What CUDA computes by way of a product of its first argument's size (ATen native/cuda/SoftMax.cu,
softmax_backward_cuda_out), where the shapes that a trace runs on see one operation.
"""
OUTSIDE = -1
"""The number of storages that were there before: weights, rotary tables, masks."""


class Recorder(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """Numbers storages in the order in which they are made, and writes down when each is made and freed.

    `events` are those of the pass that is running: ("allocate" | "free", number). `sizes_bytes` has the
    bytes of each number. `in_backward` says that what runs are torch's own formulas.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []
        self.sizes_bytes: list[int] = []
        self._numbers: dict[int, int] = {}
        self._muted = False
        self.in_backward = False

    def know(self, tensors: Iterable[torch.Tensor], number: int = OUTSIDE) -> None:
        """Take storages as there already, under a number."""
        for tensor in tensors:
            self._enter(tensor, number)

    def add(self, tensor: torch.Tensor) -> int:
        """Number a storage that an operation made which is not recorded itself."""
        number = len(self.sizes_bytes)
        self.sizes_bytes.append(tensor.untyped_storage().nbytes())
        self._enter(tensor, number)
        return number

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage."""
        return self._numbers.get(tensor.untyped_storage()._cdata, OUTSIDE)

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """What is made within is not written down."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.in_backward:
            func = IN_PLACE.get(func, func)
        temporary = None
        if func in TEMPORARIES and not self._muted:
            temporary = torch.empty_like(args[0])
            self.events.append(("allocate", self.add(temporary)))
        result = func(*args, **(kwargs or {}))
        if self._muted:
            return result
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._numbers:
                self.events.append(("allocate", self.add(tensor)))
        del temporary
        return result

    def _enter(self, tensor: torch.Tensor, number: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = number
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        number = self._numbers.pop(key)
        if number != OUTSIDE:
            self.events.append(("free", number))
