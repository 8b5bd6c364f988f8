"""GpuSpec: what a GPU gives a training process."""

from __future__ import annotations

from planner.base import validate
from planner.base.errors import FieldError
from planner.base.units import MIB
from planner.base.values import dataclass

# nvidia-smi's total less what torch sees on Linux, over the cards of profiles/gpus.toml that have a
# usable_mib, runs from 254 MiB (V100) to 728 MiB (B200); this line lies above all, by 38 MiB at the least
# (A100 40GB).
RESERVE_BYTES = 512 * MIB
RESERVE_FRACTION = 1 / 256

# A Linux desktop held 1,906 MiB with Steam open and about 1,116 MiB once it was closed
# (https://github.com/ValveSoftware/steam-for-linux/issues/9516); one with a browser 1.8 GB
# (https://github.com/NVIDIA/egl-wayland/issues/126). Heavy applications are not counted.
DISPLAY_BYTES = 1200 * MIB

NATIVE_BFLOAT16 = (8, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSpec:
    """One GPU.

    `id` is what people type, `name` the driver's name. `memory_bytes` is nvidia-smi's total;
    `usable_bytes` what processes can hold together on a Linux machine without a display: what torch
    reports as the device's total, `usable_is_measured` whether that was seen on such a card or follows from
    `reserved_bytes_upper_bound`. `bandwidth_bytes_per_second` and `matrix_flops_per_second` (dense,
    16-bit inputs, fp32 accumulation; GeForce cards run this at half their advertised rate) are published
    figures, `measured_matrix_flops_per_second` and `measured_bandwidth_bytes_per_second` what a large matmul
    and reads or copies reached. `single_flops_per_second` is fp32 without tensor cores, where there is no
    TF32 (null elsewhere). `power_watts` is the board's power limit. `supports_bfloat16` is hardware
    support: below compute capability 8.0 it is emulated. `l2_cache_bytes` is the level-2
    cache. `price_source` says who asked `price_usd_per_hour`, for what kind of use, and when. None stands
    for unknown.

    Raises:
        FieldError: a figure is outside what is possible.
    """

    id: str
    name: str
    memory_bytes: int
    usable_bytes: int
    compute_capability: tuple[int, int]
    supports_bfloat16: bool
    bandwidth_bytes_per_second: float | None
    matrix_flops_per_second: float | None
    measured_matrix_flops_per_second: float | None = None
    measured_bandwidth_bytes_per_second: float | None = None
    single_flops_per_second: float | None = None
    power_watts: float | None = None
    sm_count: int | None = None
    l2_cache_bytes: int | None = None
    price_usd_per_hour: float | None = None
    price_source: str | None = None
    usable_is_measured: bool = False
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        validate.text("id", self.id)
        validate.text("name", self.name)
        validate.integer("memory_bytes", self.memory_bytes, minimum=2**28, maximum=2**44)
        validate.integer("usable_bytes", self.usable_bytes, minimum=0, maximum=self.memory_bytes)
        validate.boolean("supports_bfloat16", self.supports_bfloat16)
        validate.boolean("usable_is_measured", self.usable_is_measured)
        for field in (
            "bandwidth_bytes_per_second",
            "matrix_flops_per_second",
            "measured_matrix_flops_per_second",
            "measured_bandwidth_bytes_per_second",
            "single_flops_per_second",
            "power_watts",
        ):
            value = getattr(self, field)
            if value is not None and validate.number(field, value, minimum=0.0, maximum=1e18) == 0.0:
                raise FieldError(field, value, "a positive number")
        if self.l2_cache_bytes is not None:
            validate.integer("l2_cache_bytes", self.l2_cache_bytes, minimum=2**18, maximum=2**32)
        if self.price_usd_per_hour is not None:
            validate.number("price_usd_per_hour", self.price_usd_per_hour, minimum=0.0, maximum=1e6)

    @property
    def dtype(self) -> str:
        """The 16-bit type to train in: float16 where bfloat16 is only emulated (V100, T4, RTX 20).

        Emulated bfloat16 matmuls run at a ninth of the float16 rate: V100S 9.85 against 88.9 TFLOPS
        (https://github.com/fanghostt/transformers-benchmarks).
        """
        return "bfloat16" if self.supports_bfloat16 else "float16"

    @property
    def peak_matrix_flops_per_second(self) -> float | None:
        """The rate no matmul exceeds: the published one, or a measured one above it (boost clocks)."""
        rates = (self.matrix_flops_per_second, self.measured_matrix_flops_per_second)
        return max((rate for rate in rates if rate is not None), default=None)


def has_native_bfloat16(compute_capability: tuple[int, int]) -> bool:
    """Whether the hardware multiplies bfloat16 matrices (NVIDIA Ampere and later)."""
    return compute_capability >= NATIVE_BFLOAT16


def reserved_bytes_upper_bound(memory_bytes: int) -> int:
    """Upper bound of what the driver keeps of a card's memory: 512 MiB and a 256th of it.

    Used where no Linux total was seen for a card, so that "fits" errs on the safe side.
    """
    return RESERVE_BYTES + int(memory_bytes * RESERVE_FRACTION)
