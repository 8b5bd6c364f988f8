"""Checkpoints whose weights are quantised already: what their config says of them, and which are refused.

bitsandbytes' own are planned and trained as they are; its reading of a config is that of transformers
(utils/quantization_config.py, BitsAndBytesConfig).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from planner.base import validate
from planner.base.errors import FieldError, InputError, shorten
from planner.base.units import DTYPE_WIDTH
from planner.base.values import dataclass

METHOD_NAMES = {
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FP8",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "torchao": "torchao",
}
"""What people call the quant_method of a config; others go by the config's own word."""
STORAGE_TYPES = ("uint8", "int8", "float16", "bfloat16", "float32")
"""What packed weights may be stored as: their bytes are the same."""
MXFP4_TYPES = frozenset({"gpt_oss"})
"""Types of models whose stacks of experts are published in MXFP4 (transformers integrations/mxfp4.py)."""
MAX_KEPT = 4096
_NAME = re.compile(r"[\w.\-]{1,200}", re.ASCII)

QUANT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """How bitsandbytes quantised a checkpoint: `bits` of a weight, and with 4 their `quant_type` and whether
    constants are quantised too. `dtype` is that of what is not quantised, null where the config does not say;
    `kept` names modules that stay so, null where transformers chose.
    """

    bits: int
    quant_type: str | None
    double_quant: bool
    dtype: str | None
    kept: tuple[str, ...] | None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise FieldError("checkpoint bits", self.bits, "4 or 8")
        if self.bits == 4:
            validate.choice("checkpoint quant_type", self.quant_type, QUANT_TYPES)
        validate.boolean("checkpoint double_quant", self.double_quant)
        if self.dtype is not None:
            validate.choice("checkpoint dtype", self.dtype, DTYPE_WIDTH)

    @property
    def plain_width(self) -> int:
        """Bytes of an element of what is not quantised; 16 bits where nothing says."""
        return DTYPE_WIDTH[self.dtype or "bfloat16"]


def is_dequantised(config: Mapping[str, Any]) -> bool:
    """Whether a config's weights are in a form that is read as the 16-bit weights that they stand for: MXFP4,
    which gpt-oss is published in and nothing trains in.
    """
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    return method == "mxfp4" and config.get("model_type") in MXFP4_TYPES


def read_quantisation(config: Mapping[str, Any], name: str, *, instead: str) -> Checkpoint | None:
    """What a config says of how its weights are quantised; None where they are not, or are read as the
    weights that they stand for.

    `name` is the config's in messages, `instead` what to use in place of weights that are not trained.

    Raises:
        InputError: they are not bitsandbytes', or in a form that is not trained.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None or is_dequantised(config):
        return None
    if not isinstance(found, Mapping):
        raise InputError(f"{name}: quantization_config is {shorten(found)}, not an object")
    four, eight = found.get("load_in_4bit", False), found.get("load_in_8bit", False)
    method = found.get("quant_method", "bitsandbytes" if four or eight else "compressed-tensors")
    if method != "bitsandbytes":
        called = METHOD_NAMES.get(method) if isinstance(method, str) else None
        raise InputError(f"{name} describes weights quantised by {called or shorten(method)}: {instead}")
    if (four, eight) not in ((True, False), (False, True)):
        raise InputError(f"{name} describes bitsandbytes weights in neither 4 nor 8 bits")
    dtype = config.get("dtype") or config.get("torch_dtype")
    plain = dtype if dtype in DTYPE_WIDTH else None
    if eight:
        return _eight(found, name, dtype=plain)
    quant_type = found.get("bnb_4bit_quant_type", "fp4")
    double = found.get("bnb_4bit_use_double_quant", False)
    stored_as = found.get("bnb_4bit_quant_storage", "uint8")
    if quant_type not in QUANT_TYPES or not isinstance(double, bool):
        said = f"bnb_4bit_quant_type {shorten(quant_type)}, bnb_4bit_use_double_quant {shorten(double)}"
        raise InputError(f"{name}: {said}; expected nf4 or fp4, true or false")
    if stored_as not in STORAGE_TYPES:
        expected = ", ".join(STORAGE_TYPES)
        raise InputError(f"{name}: bnb_4bit_quant_storage is {shorten(stored_as)}; expected {expected}")
    return Checkpoint(
        bits=4,
        quant_type=quant_type,
        double_quant=double,
        dtype=plain,
        kept=_kept(found, name),
    )


def _eight(found: Mapping[str, Any], name: str, *, dtype: str | None) -> Checkpoint:
    threshold = found.get("llm_int8_threshold", 6.0)
    whole = found.get("llm_int8_has_fp16_weight", False)
    if whole is not False or not isinstance(threshold, int | float) or threshold <= 0:
        raise InputError(
            f"{name}: llm_int8_threshold is {shorten(threshold)}, llm_int8_has_fp16_weight {shorten(whole)}; "
            "expected a number above 0, false"
        )
    return Checkpoint(bits=8, quant_type=None, double_quant=False, dtype=dtype, kept=_kept(found, name))


def _kept(found: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """llm_int8_skip_modules as plain names; transformers' own choice where it has none."""
    listed = found.get("llm_int8_skip_modules")
    if listed is None:
        return None
    if not isinstance(listed, list) or len(listed) > MAX_KEPT:
        raise InputError(f"{name}: llm_int8_skip_modules is {shorten(listed)}, not a list of modules")
    for entry in listed:
        if not isinstance(entry, str) or not _NAME.fullmatch(entry):
            raise InputError(f"{name}: llm_int8_skip_modules has {shorten(entry)}, which names no module")
    return tuple(sorted(set(listed)))
