"""What a card cannot run whatever its memory: knobs below a compute capability, torch builds without it."""

from __future__ import annotations

from collections.abc import Mapping

from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.gpus.spec import NATIVE_BFLOAT16, GpuSpec
from planner.setup.knob import KnobValue

TRITON = (7, 0)
"""torch/utils/_triton.py (2.13), cuda_extra_check: Triton is used from there on. Inductor writes its kernels
in Triton, flex attention is compiled by it, and Liger's kernels are Triton's own."""
FLASH_ATTENTION_2 = (8, 0)
"""Dao-AILab/flash-attention, README, "NVIDIA CUDA Support": Ampere, Ada or Hopper GPUs."""
FLEX_CAPABILITY = (8, 0)
"""From which flex attention is tried: torch has block sizes for these cards
(torch/_inductor/template_heuristics/triton.py, get_flex_attn_fwd_configs)."""
EIGHT_BIT = (8, 9)
"""Tensor cores that multiply e4m3: Ada, Hopper and later (NVIDIA, Ada GPU architecture, 2022, p. 26; torch's
_scaled_mm refuses others, aten/src/ATen/native/cuda/ScaledBlas.cpp)."""
DEFAULT_BUILD = (7, 5)
"""The least capability that torch 2.11 to 2.14 from PyPI, built for CUDA 13, has kernels for
(torch/cuda/__init__.py, PYTORCH_RELEASES_CODE_CC; pytorch/pytorch#175253)."""
LEGACY_BUILD = (5, 0)
"""The same of the build for CUDA 12.6, which torch 2.14 is to be the last to have
(pytorch/pytorch#190385)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardLimit:
    """A knob's value that runs from a compute capability on; `why` names what stands against it below."""

    knob: str
    value: KnobValue
    capability: tuple[int, int]
    why: str


_IN_TRITON = "its kernels are compiled by Triton"
CARD_LIMITS = (
    CardLimit(
        knob="attn_implementation",
        value="flash_attention_2",
        capability=FLASH_ATTENTION_2,
        why="flash-attn has no kernels below",
    ),
    CardLimit(knob="attn_implementation", value="flex_attention", capability=TRITON, why=_IN_TRITON),
    CardLimit(knob="compile", value="regional", capability=TRITON, why=_IN_TRITON),
    *(
        CardLimit(
            knob="base_matmul",
            value=value,
            capability=EIGHT_BIT,
            why="tensor cores below have no 8-bit floats",
        )
        for value in ("fp8_backward", "fp8")
    ),
    CardLimit(knob="kernels", value="liger", capability=TRITON, why=_IN_TRITON),
)
LIMITED_KNOBS = tuple(dict.fromkeys(limit.knob for limit in CARD_LIMITS))
"""The knobs that they limit, each once."""
BFLOAT16 = CardLimit(
    knob="dtype",
    value="bfloat16",
    capability=NATIVE_BFLOAT16,
    why="below, torch emulates it at an eighth of float16's speed, and compiles none of it",
)
"""Refused where a person asks for it, not where a setup has it by default: it runs, but nobody wants that."""


def refuse_on_card(
    knobs: Mapping[str, object], gpu: GpuSpec, limits: tuple[CardLimit, ...] = CARD_LIMITS
) -> None:
    """Refuse the first of the knobs that the card cannot run.

    Raises:
        InputError: the knob, its value, what it needs and what the card has.
    """
    for limit in limits:
        if knobs.get(limit.knob) == limit.value and gpu.compute_capability < limit.capability:
            needed, has = _dotted(limit.capability), _dotted(gpu.compute_capability)
            raise InputError(
                f"{limit.knob}={limit.value} needs compute capability {needed} ({limit.why}); "
                f"{gpu.id} has {has}"
            )


def torch_build(gpu: GpuSpec) -> str | None:
    """Which build of torch a run on the card needs, in words; None where the default one has its kernels."""
    capability = gpu.compute_capability
    if capability >= DEFAULT_BUILD:
        return None
    lacking = f"the default build has no kernels for {gpu.id} (compute capability {_dotted(capability)}): "
    if capability >= LEGACY_BUILD:
        return lacking + "take the build for CUDA 12.6, which torch has up to 2.14"
    return lacking + "no build of this stack's torch has"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
