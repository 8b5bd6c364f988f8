"""The precision that a run computes in, on fake tensors of a CPU: products in the compute dtype, as
everywhere, and in fp32 what CUDA's autocast computes so and a CPU's does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FUNCTIONS = (
    *("acos", "asin", "cosh", "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "log", "log10", "log1p"),
    *("log2", "norm", "pow", "prod", "reciprocal", "rsqrt", "sinh", "softmax", "sum", "tan"),
)
_NN_FUNCTIONS = (
    *("group_norm", "layer_norm", "normalize", "softmax", "softmin", "softplus", "log_softmax"),
    "cosine_similarity",
)
_OPERATORS = ("__pow__", "__rpow__", "__rdiv__", "__rtruediv__")
_IN_FP32 = frozenset(
    found
    for owner, names in (
        (torch, _FUNCTIONS),
        (torch.Tensor, (*_FUNCTIONS, *_OPERATORS)),
        (torch.nn.functional, _NN_FUNCTIONS),
    )
    for name in names
    if (found := getattr(owner, name, None)) is not None
)
"""What CUDA's autocast casts to fp32 (torch docs, amp: "CUDA Ops that can autocast to float32")."""
_TO_FP32 = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, ("cumprod", "cumsum", "prod", "softmax", "sum", "log_softmax")),
        (torch.Tensor, ("cumprod", "cumsum", "prod", "softmax", "sum", "log_softmax")),
        (torch.nn.functional, ("softmax", "log_softmax")),
    )
    for name in names
)
"""Those that it leaves their input, and asks for a result in fp32 (aten autocast_mode.h,
AT_FORALL_FP32_SET_OPT_DTYPE)."""


class Fp32(TorchFunctionMode):  # type: ignore[misc]  # torch has no types here
    """Casts 16-bit arguments of those functions, or has them return fp32, as CUDA's autocast does."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _TO_FP32:
            if kwargs.get("dtype") is None and _wide(args[0]) is not args[0]:
                kwargs["dtype"] = torch.float32
        elif func in _IN_FP32 and kwargs.get("dtype") is None:
            args = tuple(_wide(one) for one in args)
            kwargs = {name: _wide(one) for name, one in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Compute as a training run in that dtype does; in fp32 without autocast."""
    if dtype == torch.float32:
        yield
        return
    with torch.autocast("cpu", dtype=dtype), Fp32():
        yield
