"""Products in bfloat16 on processors that have no units for them.

There torch multiplies bfloat16 element by element, some hundred times slower than float32. Units multiply
into a float32 sum and round it once: so does what stands in for them here.
"""

from __future__ import annotations

import warnings
from typing import Any

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"

_installed: list[Any] = []
"""The registration, which ends with its object."""


def multiply_in_float32_without_units() -> None:
    """Have this process compute bfloat16 products in float32, where torch knows no faster way."""
    import torch

    if _installed or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in PRODUCTS:
            packet = getattr(torch.ops.aten, name)
            library.impl(name, _wide(packet.default, packet.default), "CPU", with_keyset=True)
            library.impl(f"{name}.out", _wide(packet.out, packet.default), "CPU", with_keyset=True)
        for name in (ATTENTION, f"{ATTENTION}_backward"):
            operation = getattr(torch.ops.aten, name).default
            library.impl(name, _wide(operation, operation), "CPU", with_keyset=True)
    _installed.append(library)


def _wide(operation: Any, plain: Any) -> Any:
    """`operation` in place of its kernel for the CPU; `plain` is the form that returns what it computes."""
    import torch

    kernel = torch.library.get_kernel(operation, "CPU")

    def is_narrow(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16

    def wide(value: Any) -> Any:
        return value.float() if is_narrow(value) else value

    def compute(keyset: Any, *args: Any, **options: Any) -> Any:
        if not any(map(is_narrow, args)):
            return kernel.call_boxed(keyset, *args, **options)
        out = options.pop("out", None)
        found = plain(*map(wide, args), **{name: wide(value) for name, value in options.items()})
        if out is not None:
            return out.copy_(found)
        if isinstance(found, torch.Tensor):
            return found.bfloat16()
        # Attention's log of sums is float32 for every type, its result and gradients are not.
        return tuple(
            part if operation is forward and at else part.bfloat16() for at, part in enumerate(found)
        )

    forward = getattr(torch.ops.aten, ATTENTION).default
    return compute
