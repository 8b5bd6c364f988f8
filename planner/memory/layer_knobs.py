"""What a setup says about every decoder layer, as far as its replay asks."""

from __future__ import annotations

from dataclasses import dataclass

from planner.memory.linear import LinearKind

FP32 = 4
"""Bytes of an fp32 element."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKnobs:
    """What the setup says about every layer: kinds of linear layers by module name, and attention.

    `attention` is the implementation that runs ("fused", "masked", "math" or "eager", see
    planner/memory/attention.py). `stream_bytes` is the width of the hidden states that enter the layer,
    `norm_bytes` that of the norms' weights. `liger` says that Liger's layer kernels run,
    `selective` that checkpoints keep attention's outputs.
    """

    kinds: tuple[tuple[str, LinearKind], ...]
    default: LinearKind
    attention: str
    stream_bytes: int
    norm_bytes: int
    liger: bool
    selective: bool

    def kind(self, name: str) -> LinearKind:
        """The kind of the linear layer of that module name."""
        for known, kind in self.kinds:
            if known == name:
                return kind
        return self.default
