"""Products in bfloat16 on processors that have no units for them.

There torch multiplies bfloat16 element by element, some hundred times slower than float32. Units multiply
into a float32 sum and round it once: so does what stands in for them here.
"""

from __future__ import annotations

import warnings
from typing import Any

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")

_installed: list[Any] = []
"""The registration, which ends with its object."""


def multiply_in_float32_without_units() -> None:
    """Have this process compute bfloat16 products in float32, where torch knows no faster way."""
    import torch

    if _installed or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    library = torch.library.Library("aten", "IMPL")
    for name in PRODUCTS:
        packet = getattr(torch.ops.aten, name)
        for operation, kernel_name in ((packet.default, name), (packet.out, f"{name}.out")):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel")
                library.impl(kernel_name, _product(packet.default, operation), "CPU", with_keyset=True)
    _installed.append(library)


def _product(plain: Any, operation: Any) -> Any:
    """`operation` in place of its kernel for the CPU; `plain` is the form that returns what it computes."""
    import torch

    kernel = torch.library.get_kernel(operation, "CPU")

    def compute(keyset: Any, *args: Any, **options: Any) -> Any:
        if not any(isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16 for value in args):
            return kernel.call_boxed(keyset, *args, **options)
        out = options.pop("out", None)
        found = plain(*(v.float() if isinstance(v, torch.Tensor) else v for v in args), **options)
        return found.bfloat16() if out is None else out.copy_(found)

    return compute
