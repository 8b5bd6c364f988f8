"""The GPU catalog: loads profiles/gpus.toml and finds cards by id, alias or driver name."""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from planner.base.data_files import PROFILES
from planner.base.errors import UnknownNameError
from planner.base.units import MIB
from planner.base.values import dataclass
from planner.gpus.prices import ListedPrice, is_newer, kept_prices
from planner.gpus.spec import GpuSpec, has_native_bfloat16, reserved_bytes_upper_bound

CATALOG_FILE = PROFILES / "gpus.toml"

# ECC takes a sixteenth of GDDR6 memory (RTX A6000: 49140 MiB without, 46068 with), drivers' totals differ by
# tens of MiB, and two sizes of one name differ by a sixth at the least (RTX 3080).
MEMORY_TOLERANCE = 0.08

_SEPARATORS = re.compile(r"[\s_-]+")
_VENDOR = re.compile(r"^(?:nvidia|geforce|tesla)+(?=.)")


def normalise(name: str) -> str:
    """Reduce a name to what identifies it: lower case, without spaces, "_", "-" and vendor words."""
    return _VENDOR.sub("", _SEPARATORS.sub("", name.lower()))


@dataclass(frozen=True, slots=True)
class GpuCatalog:
    """The shipped cards and an index of their names."""

    gpus: tuple[GpuSpec, ...]
    by_name: Mapping[str, tuple[GpuSpec, ...]]

    def __iter__(self) -> Iterator[GpuSpec]:
        return iter(self.gpus)

    def __len__(self) -> int:
        return len(self.gpus)

    def named(self, name: str) -> tuple[GpuSpec, ...]:
        """Return the cards that a typed name may mean, the one to take first; empty if unknown.

        A name that several cards carry ("a100", "5060 Ti") means the one with the least memory, so that a
        verdict "fits" holds on all of them.
        """
        return self.by_name.get(normalise(name), ())

    def get(self, name: str) -> GpuSpec:
        """Look a card up by id, alias or driver name.

        Raises:
            UnknownNameError: no card has that name; the message suggests near ones.
        """
        found = self.named(name)
        if not found:
            raise UnknownNameError("GPU", name, self.suggestions(), "(list them with: vramwise gpus)")
        return found[0]

    def match_driver(self, name: str, memory_bytes: int) -> GpuSpec | None:
        """Find the card of a driver's name whose memory agrees; None when no such card is in the catalog."""
        key = normalise(name)
        candidates = [
            gpu
            for gpu in self.gpus
            if normalise(gpu.name) == key
            and abs(gpu.memory_bytes - memory_bytes) <= MEMORY_TOLERANCE * gpu.memory_bytes
        ]
        return min(candidates, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes), default=None)

    def suggestions(self) -> tuple[str, ...]:
        """Names to compare a misspelt one with."""
        names = [gpu.id for gpu in self.gpus] + [alias for gpu in self.gpus for alias in gpu.aliases]
        return tuple(dict.fromkeys(names))


@functools.cache
def gpu_catalog() -> GpuCatalog:
    """Load the shipped catalog once, with the prices that the person at this machine had refreshed.

    Raises:
        InputError: the file of refreshed prices holds something else.
    """
    with CATALOG_FILE.open("rb") as file:
        tables = tomllib.load(file)
    prices = kept_prices()
    gpus = tuple(_priced(_gpu(id_, table), prices.get(id_)) for id_, table in tables.items())
    return GpuCatalog(gpus, _index(gpus))


def _priced(gpu: GpuSpec, price: ListedPrice | None) -> GpuSpec:
    if price is None or not is_newer(price, gpu):
        return gpu
    return dataclasses.replace(gpu, price_usd_per_hour=price.usd_per_hour, price_source=price.source)


def _gpu(id_: str, table: dict[str, Any]) -> GpuSpec:
    memory_bytes = table["memory_mib"] * MIB
    usable_mib = table.get("usable_mib")
    if usable_mib is None:
        usable_bytes = memory_bytes - reserved_bytes_upper_bound(memory_bytes)
    else:
        usable_bytes = usable_mib * MIB
    major, minor = str(table["compute_capability"]).split(".")
    capability = (int(major), int(minor))
    return GpuSpec(
        id=id_,
        name=table["name"],
        memory_bytes=memory_bytes,
        usable_bytes=usable_bytes,
        usable_is_measured=usable_mib is not None,
        compute_capability=capability,
        supports_bfloat16=has_native_bfloat16(capability),
        bandwidth_bytes_per_second=_scaled(table.get("bandwidth_gb_per_second"), 1e9),
        matrix_flops_per_second=_scaled(table.get("matrix_tflops"), 1e12),
        measured_matrix_flops_per_second=_scaled(table.get("measured_matrix_tflops"), 1e12),
        measured_bandwidth_bytes_per_second=_scaled(table.get("measured_bandwidth_gb_per_second"), 1e9),
        single_flops_per_second=_scaled(table.get("single_tflops"), 1e12),
        power_watts=table.get("power_watts"),
        sm_count=table.get("sm_count"),
        l2_cache_bytes=None if "l2_cache_mib" not in table else int(table["l2_cache_mib"] * MIB),
        price_usd_per_hour=table.get("price_usd_per_hour"),
        price_source=table.get("price_source"),
        aliases=tuple(table.get("aliases", ())),
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _index(gpus: tuple[GpuSpec, ...]) -> dict[str, tuple[GpuSpec, ...]]:
    names: dict[str, list[GpuSpec]] = {}
    for gpu in gpus:
        for key in {normalise(name) for name in (gpu.id, gpu.name, *gpu.aliases)}:
            names.setdefault(key, []).append(gpu)
    for gpu in gpus:
        # An id means its own card, whatever else is called so.
        names[normalise(gpu.id)] = [gpu]
    return {key: tuple(sorted(found, key=lambda gpu: gpu.memory_bytes)) for key, found in names.items()}
