"""GpuSpec: what a GPU gives a training process."""

from __future__ import annotations

from dataclasses import dataclass

from planner import validate


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSpec:
    """One GPU.

    `id` is what people type, `name` the driver's name. `memory_bytes` is nvidia-smi's total;
    `usable_bytes` what processes can hold together on a Linux machine without a display: what torch
    reports as the device's total. `bandwidth_bytes_per_second` and `matrix_flops_per_second` (dense,
    16-bit inputs, fp32 accumulation; GeForce cards run this at half their advertised rate) are published
    figures. `supports_bfloat16` is hardware support: below compute capability 8.0 it is emulated.
    None stands for unknown.
    """

    id: str
    name: str
    memory_bytes: int
    usable_bytes: int
    compute_capability: tuple[int, int]
    supports_bfloat16: bool
    bandwidth_bytes_per_second: float | None
    matrix_flops_per_second: float | None
    sm_count: int | None = None
    price_usd_per_hour: float | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        validate.text("id", self.id)
        validate.text("name", self.name)
        validate.integer("memory_bytes", self.memory_bytes, minimum=2**28, maximum=2**44)
        validate.integer("usable_bytes", self.usable_bytes, minimum=0, maximum=self.memory_bytes)
        validate.boolean("supports_bfloat16", self.supports_bfloat16)
        for field in ("bandwidth_bytes_per_second", "matrix_flops_per_second", "price_usd_per_hour"):
            value = getattr(self, field)
            if value is not None:
                validate.number(field, value, minimum=0.0, maximum=1e18)
