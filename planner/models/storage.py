"""Storage: how a base model's weights lie in memory, in 4 bits with their constants or in 16 or 32."""

from __future__ import annotations

from planner.base.units import MIB
from planner.base.values import dataclass
from planner.models.parameter import Parameter

QUANTIZED_CLASSES = ("Linear", "Conv1D")
"""transformers replaces exactly these classes (integrations/bitsandbytes.py, replace_with_bnb_linear)."""
EXPERT_NAMES = ("gate_up_proj", "down_proj")
"""Stacks of experts, parameters of three dimensions (transformers models/mixtral, qwen3_moe)."""
_ADAPTED_EXPERTS = frozenset(
    {"afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"}
    | {"exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa"}
    | {"hunyuan_v1_moe", "longcat_flash", "mellum", "minimax", "minimax_m2", "mixtral", "olmoe"}
    | {"qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"}
    | {"qwen3_omni_moe_thinker", "solar_open"}
)
"""Types of models whose experts PEFT adapts as it did when each was linear layers of its own (0.21.2,
utils/transformers_weight_conversion.py, by transformers 5.23, conversion_mapping.py)."""
QUANTIZATION_BLOCK = 64
"""Elements a quantisation constant covers (bitsandbytes nn/modules.py, Params4bit)."""
NESTED_BLOCK = 256
"""Constants a nested constant covers (bitsandbytes functional.py, quantize_4bit)."""
ABSMAX_WIDTH = 4
"""Bytes of a constant before it is quantised itself (fp32)."""

SLICE_BYTES = 64 * MIB
"""Dequantised experts that a sliced product has at a time, at least one of them: chosen, large enough for a
kernel and small beside a layer's experts (gpt-oss-20b: two of 32 of gate and up, 63 MiB of 1,013)."""

EIGHT_BIT_MULTIPLE = 16
"""What 8-bit products ask of both sizes of a weight (torch aten/src/ATen/native/cuda/ScaledBlas.cpp); others
are left in 16 bits (launcher/training/products/base_linear.py)."""
EXACT_ENDS = 2
"""With base_matmul fp8 the first and the last so many decoder layers keep their forward pass in 16 bits:
three quarters of what 8-bit products add to the loss at once come from there (docs/eight-bit.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How base weights are held.

    `quantized` says that bitsandbytes holds what it can in `bits`: in 4 with constants that `double_quant`
    quantises again, in 8 with one for each output. `width` is the bytes of an element that stays as it is,
    and of a dequantised one. `experts` says that the launcher holds stacks of experts in 4 bits too
    (launcher/training/loading/quantised_experts.py), and `slices_experts` that products with them dequantise
    a few experts at a time (launcher/training/products/sliced_experts.py). `stored` is the width of what
    stays as it is in a file whose weights are quantised already, null where they are quantised while they
    are loaded; it is `recast` after loading where the file has another dtype. `tower` says that the linear
    layers of a vision tower are quantised as well.
    """

    quantized: bool
    bits: int = 4
    double_quant: bool
    width: int
    experts: bool = False
    slices_experts: bool = False
    stored: int | None = None
    recast: bool = False
    tower: bool = False

    def quantizes(self, parameter: Parameter) -> bool:
        """Whether the parameter is held in 4 bits, or in 8."""
        return self.quantized and (is_quantizable(parameter) or (self.experts and is_expert_stack(parameter)))

    def quantizes_in_tower(self, parameter: Parameter) -> bool:
        """The same of a vision tower's: of all its linear layers' weights or of none."""
        linear = parameter.module_class in QUANTIZED_CLASSES and parameter.kind == "weight"
        return self.quantized and self.tower and linear


def is_expert_stack(parameter: Parameter) -> bool:
    """Whether the parameter is a stack of experts' weights."""
    return parameter.kind in EXPERT_NAMES and len(parameter.shape) == 3


def adapts_experts(model_type: str) -> bool:
    """Whether PEFT adapts the stacks of experts of such models where target_modules name their matrices; of
    all others it adapts linear layers alone.
    """
    return model_type in _ADAPTED_EXPERTS


def is_quantizable(parameter: Parameter) -> bool:
    """Whether transformers has bitsandbytes hold the parameter in 4 bits.

    Kept in 16 bits: embeddings, norms, biases, routers, 3-D experts and the output head
    (transformers quantizers/base.py, get_keys_to_not_convert), and what a checkpoint keeps so.
    """
    return (
        parameter.module_class in QUANTIZED_CLASSES
        and parameter.kind == "weight"
        and not parameter.is_output_head
        and not parameter.kept
    )


def expert_slices(experts: int, elements: int, width: int) -> tuple[int, ...]:
    """How many experts a sliced product dequantises at a time, slice by slice, of a stack of `experts` with
    so many `elements` each, dequantised to `width` bytes. A slice begins where a quantisation constant does;
    where experts do not, there is one slice of all.
    """
    if elements % QUANTIZATION_BLOCK:
        return (experts,)
    size = min(experts, max(1, SLICE_BYTES // (elements * width)))
    whole, rest = divmod(experts, size)
    return (size,) * whole + ((rest,) if rest else ())
