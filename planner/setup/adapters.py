"""Adapters: what is trained beside a frozen base."""

from __future__ import annotations

from planner.base.units import FP32
from planner.base.values import dataclass
from planner.setup.stack import Stack
from planner.setup.training_knobs import LORAFA
from planner.setup.training_setup import TrainingSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterVariant:
    """A kind of low-rank adapter. `magnitudes` says that it trains a vector of one value an output beside its
    two matrices, in fp32 whatever they are in, and folds base and adapter into one weight for its norm;
    `frozen_down` that lora_A stays as it began, so that no layer keeps its input for it. A
    `peft_type` other than lora has other tensors (planner/setup/trained.py).
    """

    name: str
    magnitudes: bool
    frozen_down: bool = False
    peft_type: str = "lora"


UNCOMMON: tuple[tuple[str, object], ...] = (
    ("peft_type", "lora"),
    ("bias", "none"),
    ("modules_to_save", None),
    ("trainable_token_indices", None),
)
"""Knobs that train something else than a pair of matrices, with the value that does not: what was measured,
and what other trainers' files hold, is without them.
"""


UNCOMMON_OPTIMIZERS = (LORAFA,)
"""Optimizers that want, or are, another way to train."""


def uncommon_knob(setup: TrainingSetup) -> str | None:
    """The first of them that is used; `optim` where it is one of those optimizers."""
    if setup.optim in UNCOMMON_OPTIMIZERS:
        return "optim"
    return next((name for name, plain in UNCOMMON if getattr(setup, name) != plain), None)


LORA = AdapterVariant(name="lora", magnitudes=False)
DORA = AdapterVariant(name="dora", magnitudes=True)
"""PEFT tuners/lora/dora.py."""
LORA_FA = AdapterVariant(name="lora-fa", magnitudes=False, frozen_down=True)
"""https://arxiv.org/abs/2308.03303; PEFT optimizers/lorafa.py."""
VERA, MISS, OFT = (
    AdapterVariant(name=name, magnitudes=False, peft_type=name) for name in ("vera", "miss", "oft")
)
"""PEFT tuners/vera, tuners/miss and tuners/oft: https://arxiv.org/abs/2310.11454, https://arxiv.org/abs/2409.15371,
https://arxiv.org/abs/2506.19847.
"""
VARIANTS = (LORA, DORA, LORA_FA, VERA, MISS, OFT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An adapter: its kind, its rank, the modules that carry it, and the bytes of an element of its matrices.

    `target_modules` is TrainingSetup's, and so are `bias` and `modules_to_save`, what is trained beside the
    adapter; `token_rows` is how many tokens' embeddings are.
    """

    variant: AdapterVariant
    rank: int
    target_modules: str | tuple[str, ...]
    width: int
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    token_rows: int = 0


def adapter_of(setup: TrainingSetup, stack: Stack) -> Adapter | None:
    """The adapter that a setup trains; None where it trains all weights.

    The stack casts adapters on a quantised base; PEFT holds them in fp32 otherwise (tuners_utils.py,
    cast_adapter_dtype), and so does the launcher when it trains in float16.
    """
    if not setup.uses_lora:
        return None
    saved, variant = setup.modules_to_save, _variant(setup)
    # VeRA's vectors begin at 0.1, from which a step is lost in 16 bits: the launcher holds them in fp32.
    narrow = setup.method == "qlora" and setup.dtype != "float16" and variant != VERA
    return Adapter(
        variant=variant,
        rank=setup.lora_r,
        target_modules=setup.target_modules,
        width=stack.adapter_width if narrow else FP32,
        bias=setup.bias,
        modules_to_save=saved if isinstance(saved, tuple) else (),
        token_rows=len(setup.trainable_token_indices or ()),
    )


def _variant(setup: TrainingSetup) -> AdapterVariant:
    if setup.peft_type != "lora":
        return next(one for one in VARIANTS if one.peft_type == setup.peft_type)
    return DORA if setup.use_dora else LORA_FA if setup.optim == LORAFA else LORA
