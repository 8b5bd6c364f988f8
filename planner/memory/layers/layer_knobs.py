"""What a setup says about every decoder layer, as far as its operations ask."""

from __future__ import annotations

from dataclasses import replace

from planner.base.values import dataclass
from planner.memory.layers.base_weight import LinearKind


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKnobs:
    """What the setup says about every layer: kinds of linear layers by module name, and attention.

    `attention` is the kernel that runs (one of planner.setup.attention.ATTENTION_KERNELS).
    `stream_width` is the width of the hidden states that enter the layer, `norm_width` that of the norms'
    weights. `liger` says that Liger's layer kernels run, `selective` that checkpoints keep attention's
    outputs. `compiled` says that torch.compile compiles the layer; it then `recomputes` what it lacks within
    its backward graph if it is checkpointed, and else keeps what a `budget` (0 to 1) leaves it. With one
    `graph_tokens` are the tokens of a micro-step, else 0.
    """

    kinds: tuple[tuple[str, LinearKind], ...]
    default: LinearKind
    attention: str
    stream_width: int
    norm_width: int
    liger: bool
    selective: bool
    compiled: bool = False
    recomputes: bool = False
    budget: float | None = None
    graph_tokens: int = 0

    def accumulating(self, value: bool) -> LayerKnobs:
        """The same knobs with gradients of earlier micro-steps there, or not."""
        return replace(
            self,
            default=replace(self.default, accumulating=value),
            kinds=tuple((name, replace(kind, accumulating=value)) for name, kind in self.kinds),
        )

    def keeping(self, names: tuple[str, ...]) -> LayerKnobs:
        """The same knobs with linear layers of those names in 16 bits."""
        if not names:
            return self
        held = {**dict.fromkeys(names, self.default), **dict(self.kinds)}
        kinds = (
            (name, replace(kind, quantized=False) if name in names else kind) for name, kind in held.items()
        )
        return replace(self, kinds=tuple(kinds))

    def exact_forward(self) -> LayerKnobs:
        """The same knobs with no forward product in 8 bits."""
        return replace(
            self,
            default=replace(self.default, eight_bit_forward=False),
            kinds=tuple((name, replace(kind, eight_bit_forward=False)) for name, kind in self.kinds),
        )

    def without_adapters(self) -> LayerKnobs:
        """The same knobs with no adapter at work, as where PEFT has them disabled, and nothing kept."""
        return replace(
            self,
            kinds=tuple(
                (name, replace(kind, rank=0, dropout=False, dora=False)) for name, kind in self.kinds
            ),
            selective=False,
        ).accumulating(False)

    def kind(self, name: str) -> LinearKind:
        """The kind of the linear layer of that module name."""
        for known, kind in self.kinds:
            if known == name:
                return kind
        return self.default
