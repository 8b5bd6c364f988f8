"""Microbenchmarks: what single kernels reach on one GPU and host, and two GPUs' ratios by kind of work.

Shipped ones lie in profiles/calibration/microbenchmarks, a person's own in the user data folder.
`launcher.measuring.microbench` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.base import validate
from planner.base.data_files import PROFILES, read_json, user_data_dir
from planner.base.errors import FieldError
from planner.base.json_codec import decode_fields, encode_fields
from planner.base.values import dataclass

SCHEMA_VERSION = 1
RATE_LIMIT = 1e18


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixRate:
    """Rate of a product of `tokens` x `inputs` with `outputs` x `inputs` transposed."""

    tokens: int
    inputs: int
    outputs: int
    flops_per_second: float

    def __post_init__(self) -> None:
        validate.number("flops_per_second", self.flops_per_second, minimum=1.0, maximum=RATE_LIMIT)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRate:
    """Rate of causal attention, forward and backward, over sequences of `length`."""

    head_dim: int
    length: int
    flops_per_second: float

    def __post_init__(self) -> None:
        validate.number("flops_per_second", self.flops_per_second, minimum=1.0, maximum=RATE_LIMIT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbenchmarks:
    """Rates of one GPU (`gpu`, its catalog id; `gpu_name`, the driver's) in its training `dtype`.

    `matrix` are products of the size of a layer's, `adapter` pairs of products through a LoRA rank of 16
    (inputs to rank to outputs), `single` in float32 without tensor cores, `tf32` as the launcher lets it
    run (null in files from before it was timed). Bytes are those read and written
    (`copy`, `elementwise`), written (`dequantized`, from NF4 with double quantisation) or moved between the
    host's pinned memory and the GPU (`host_copy`). Of the host: a tiny kernel (`kernel_launch`), four RMS
    norms with SiLU forward and backward (`eager_block`), and a pass through a 4-bit layer with LoRA
    (`quantized_call`). None: what the machine has no memory or no hardware for. `versions` are (package,
    version) pairs, `created` is UTC in ISO form.
    """

    gpu: str
    gpu_name: str
    created: str
    dtype: str
    versions: tuple[tuple[str, str], ...]
    matrix: tuple[MatrixRate, ...]
    adapter: tuple[MatrixRate, ...]
    attention: tuple[AttentionRate, ...]
    single_flops_per_second: float | None
    copy_bytes_per_second: float
    elementwise_bytes_per_second: float
    dequantized_bytes_per_second: float | None
    host_copy_bytes_per_second: float | None
    kernel_launch_seconds: float
    eager_block_seconds: float
    quantized_call_seconds: float | None
    tf32_flops_per_second: float | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        validate.text("microbenchmarks gpu", self.gpu)
        if self.schema_version != SCHEMA_VERSION:
            raise FieldError("schema_version", self.schema_version, str(SCHEMA_VERSION))
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is None:
                continue
            if name.endswith("_per_second"):
                validate.number(name, value, minimum=1.0, maximum=RATE_LIMIT)
            elif name.endswith("_seconds"):
                validate.number(name, value, minimum=1e-9, maximum=10.0)

    @property
    def peak_matrix_flops_per_second(self) -> float | None:
        """The fastest product seen; None when there was memory for none."""
        return max((one.flops_per_second for one in self.matrix), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return encode_fields(self)

    @classmethod
    def from_dict(cls, values: object) -> Microbenchmarks:
        """Read the JSON form.

        Raises:
            InputError: the JSON is not a set of microbenchmarks.
        """
        return decode_fields(cls, values, "microbenchmarks")


@dataclass(frozen=True, kw_only=True, slots=True)
class Slowdown:
    """How many times longer one GPU and its host take than another, by kind of work; None: not measured."""

    matrix: float | None
    adapter: float | None
    attention: float | None
    masked_attention: float | None
    single: float | None
    elementwise: float | None
    dequantized: float | None
    host_copy: float | None
    launch: float | None
    quantized_call: float | None


def slowdown(gpu: Microbenchmarks, reference: Microbenchmarks) -> Slowdown:
    """Compare two GPUs over what was measured on both; of shapes, the mean of the logarithms."""
    return Slowdown(
        matrix=_by_shape(gpu.matrix, reference.matrix),
        adapter=_by_shape(gpu.adapter, reference.adapter),
        attention=_by_shape(gpu.attention, reference.attention),
        # Attention with a mask is not timed.
        masked_attention=_by_shape(gpu.attention, reference.attention),
        single=_ratio(reference.tf32_flops_per_second, gpu.tf32_flops_per_second),
        elementwise=_ratio(reference.elementwise_bytes_per_second, gpu.elementwise_bytes_per_second),
        dequantized=_ratio(reference.dequantized_bytes_per_second, gpu.dequantized_bytes_per_second),
        host_copy=_ratio(reference.host_copy_bytes_per_second, gpu.host_copy_bytes_per_second),
        launch=_ratio(gpu.eager_block_seconds, reference.eager_block_seconds),
        quantized_call=_ratio(gpu.quantized_call_seconds, reference.quantized_call_seconds),
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


Shaped = Sequence[MatrixRate] | Sequence[AttentionRate]


def _by_shape(gpu: Shaped, reference: Shaped) -> float | None:
    known = {_shape(one): one.flops_per_second for one in reference}
    logs = [math.log(known[_shape(one)] / one.flops_per_second) for one in gpu if _shape(one) in known]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _shape(rate: MatrixRate | AttentionRate) -> tuple[int, ...]:
    if isinstance(rate, MatrixRate):
        return (rate.tokens, rate.inputs, rate.outputs)
    return (rate.head_dim, rate.length)


def own_file(gpu_id: str) -> Path:
    """Where this machine's microbenchmarks of a GPU are kept."""
    return user_data_dir() / "calibration" / "microbenchmarks" / f"{gpu_id}.json"


@lru_cache(maxsize=64)
def own_microbenchmarks_of(gpu_id: str) -> Microbenchmarks | None:
    """What this machine measured of a GPU; None when it has not.

    Raises:
        InputError: the file cannot be read.
    """
    path = own_file(gpu_id)
    return read_microbenchmarks(path) if path.exists() else None


@lru_cache(maxsize=64)
def microbenchmarks_of(gpu_id: str) -> Microbenchmarks | None:
    """A GPU's microbenchmarks, this machine's own before the shipped ones; None when there are none.

    Raises:
        InputError: a file cannot be read.
    """
    path = PROFILES / "calibration" / "microbenchmarks" / f"{gpu_id}.json"
    return own_microbenchmarks_of(gpu_id) or (read_microbenchmarks(path) if path.exists() else None)


def forget_microbenchmarks() -> None:
    """Read files anew from now on."""
    own_microbenchmarks_of.cache_clear()
    microbenchmarks_of.cache_clear()


def read_microbenchmarks(path: Path) -> Microbenchmarks:
    """Read one file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    return read_json(path, Microbenchmarks.from_dict)
