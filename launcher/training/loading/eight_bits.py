"""Products of weights in 8 bits that keep nothing of their inputs.

bitsandbytes 0.50.2 keeps the input of each of them as an attribute of its autograd node, which checkpointing
does not see (autograd/_functions.py, MatMul8bitLt and MatMul8bitFp): a checkpointed layer then keeps the
inputs of all its linear layers, as if it were not. Only the gradient of the weight reads it, and nobody asks
for that.
"""

from __future__ import annotations

from typing import Any

NEEDED_BY = {"bitsandbytes": "0.50.2"}
"""The newest release that was seen to need what is done here."""


def keep_no_inputs() -> None:
    """Have the products of this process let their inputs go where the weight wants no gradient."""
    from bitsandbytes.autograd import _functions

    for product, kept in (
        (_functions.MatMul8bitLt, {"tensors": (None, None, None)}),
        # What runs on a CPU while a model trains.
        (_functions.MatMul8bitFp, {"A": None}),
    ):
        if not hasattr(product.forward, "keeps_no_input"):
            product.forward = staticmethod(_letting_go(product.forward, kept))


def _letting_go(forward: Any, kept: dict[str, Any]) -> Any:
    def own(ctx: Any, *arguments: Any) -> Any:
        result = forward(ctx, *arguments)
        if not ctx.needs_input_grad[1]:
            for name, value in kept.items():
                setattr(ctx, name, value)
        return result

    own.keeps_no_input = True  # type: ignore[attr-defined]
    own.__wrapped__ = forward  # type: ignore[attr-defined]
    return own
