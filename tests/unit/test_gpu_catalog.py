from __future__ import annotations

import math
import tomllib

import pytest

from planner.base.errors import UnknownNameError
from planner.gpus.catalog import CATALOG_FILE, gpu_catalog, normalise
from planner.gpus.spec import MIB, GpuSpec, reserved_bytes_upper_bound
from tests.each import for_each

CATALOG = gpu_catalog()
ALL = for_each(CATALOG, name=lambda gpu: gpu.id)


def test_the_catalog_has_the_cards_people_fine_tune_on() -> None:
    assert len(CATALOG) >= 45
    ids = {gpu.id for gpu in CATALOG}
    assert {"rtx-4090", "rtx-5060-ti-16gb", "h100-80gb", "h200", "a100-40gb", "a100-80gb", "t4"} <= ids
    assert {"h100-pcie-80gb", "v100-16gb", "l4", "l40s", "rtx-a6000", "rtx-3080-10gb"} <= ids


def test_every_figure_has_a_source_and_every_source_a_figure() -> None:
    figures = tomllib.loads(CATALOG_FILE.read_text(encoding="utf-8"))
    sources = tomllib.loads(CATALOG_FILE.with_name("gpu_sources.toml").read_text(encoding="utf-8"))
    for id_, table in figures.items():
        fields = set(table) - {"name", "aliases", "price_source"}
        assert fields == set(sources[id_]), id_
        assert all(len(text) > 10 for text in sources[id_].values()), id_
        # What a plan says of a price is what its source says.
        if "price_usd_per_hour" in table:
            who, kind, date = table["price_source"].split(", ")
            source = sources[id_]["price_usd_per_hour"]
            assert source.startswith(f"{kind}, {date}: "), id_
            assert who.lower() in source.lower(), id_
    assert set(figures) == set(sources)


@ALL
def test_ids_and_aliases_find_their_card_however_they_are_typed(gpu: GpuSpec) -> None:
    for typed in (gpu.id, gpu.id.upper(), gpu.id.replace("-", " "), gpu.id.replace("-", "_")):
        assert CATALOG.get(typed) is gpu
    for alias in gpu.aliases:
        assert gpu in CATALOG.named(alias)


@ALL
def test_a_name_of_several_cards_means_the_least_memory(gpu: GpuSpec) -> None:
    for name in (gpu.id, gpu.name, *gpu.aliases):
        found = CATALOG.named(name)
        assert found[0].memory_bytes == min(other.memory_bytes for other in found)
        # More than one size is the only reason to share a name.
        assert len({other.memory_bytes for other in found}) == len(found)


def test_no_name_is_another_cards_id() -> None:
    ids = {normalise(gpu.id): gpu for gpu in CATALOG}
    assert len(ids) == len(CATALOG)
    for gpu in CATALOG:
        for name in (gpu.name, *gpu.aliases):
            assert ids.get(normalise(name), gpu) is gpu


@ALL
def test_the_drivers_name_and_memory_find_the_card(gpu: GpuSpec) -> None:
    assert CATALOG.match_driver(gpu.name, gpu.memory_bytes) is gpu
    assert CATALOG.match_driver(gpu.name.removeprefix("NVIDIA "), gpu.memory_bytes - 30 * MIB) is gpu


@pytest.mark.parametrize(
    ("name", "mib", "id_"),
    [
        ("NVIDIA GeForce RTX 5060 Ti", 8151, "rtx-5060-ti-8gb"),
        ("NVIDIA GeForce RTX 5060 Ti", 16311, "rtx-5060-ti-16gb"),
        ("NVIDIA GeForce RTX 3080", 12288, "rtx-3080-12gb"),
        ("NVIDIA RTX A6000", 46068, "rtx-a6000"),
        ("NVIDIA GeForce RTX 3060", 8192, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),
        ("NVIDIA GeForce RTX 4090", 49140, None),
    ],
)
def test_cards_that_share_a_driver_name_are_told_apart_by_memory(
    name: str, mib: int, id_: str | None
) -> None:
    found = CATALOG.match_driver(name, mib * MIB)
    assert (found.id if found else None) == id_


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(UnknownNameError, match="rtx-4090"):
        CATALOG.get("rtx-4900")


@ALL
def test_the_reserve_rule_never_promises_more_than_was_seen(gpu: GpuSpec) -> None:
    by_rule = gpu.memory_bytes - reserved_bytes_upper_bound(gpu.memory_bytes)
    assert by_rule <= gpu.usable_bytes < gpu.memory_bytes
    if not gpu.usable_is_measured:
        assert gpu.usable_bytes == by_rule


@ALL
def test_float16_below_capability_8_and_bfloat16_from_there(gpu: GpuSpec) -> None:
    assert gpu.dtype == ("bfloat16" if gpu.compute_capability >= (8, 0) else "float16")


def test_float16_is_planned_for_v100_t4_and_rtx_20() -> None:
    assert {CATALOG.get(name).dtype for name in ("v100", "t4", "2080ti", "titan-rtx")} == {"float16"}
    assert {CATALOG.get(name).dtype for name in ("a100", "3060", "l4", "5090")} == {"bfloat16"}


def test_geforce_rates_are_those_with_fp32_accumulation() -> None:
    # SM x FLOP a clock x boost: 512 on GeForce since Turing, 1024 on the same dies sold for workstations.
    assert CATALOG.get("rtx-4090").matrix_flops_per_second == pytest.approx(128 * 512 * 2.52e9, rel=0.01)
    assert CATALOG.get("rtx-3090").matrix_flops_per_second == pytest.approx(82 * 512 * 1.695e9, rel=0.01)
    assert CATALOG.get("rtx-a6000").matrix_flops_per_second == pytest.approx(84 * 1024 * 1.8e9, rel=0.01)


@ALL
def test_no_rate_is_a_sparse_one(gpu: GpuSpec) -> None:
    """A measured matmul comes to 0.6 to 1.2 of a dense rate; against a sparse rate it would be about half.
    A T4 at 70 W reaches 0.37.
    """
    if gpu.measured_matrix_flops_per_second and gpu.matrix_flops_per_second:
        assert (
            (0.3 if gpu.id == "t4" else 0.6)
            < gpu.measured_matrix_flops_per_second / gpu.matrix_flops_per_second
            < 1.2
        )
    if gpu.matrix_flops_per_second and gpu.sm_count and gpu.compute_capability >= (7, 0):
        a_clock = gpu.matrix_flops_per_second / gpu.sm_count
        flops_at_most = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024}
        limit = flops_at_most.get(gpu.compute_capability, 8192 if gpu.compute_capability[0] < 12 else 1024)
        assert a_clock <= limit * 2.75e9


def test_only_the_card_without_published_rates_has_none() -> None:
    unknown = [gpu.id for gpu in CATALOG if gpu.peak_matrix_flops_per_second is None]
    assert unknown == ["gh200-96gb"]
    assert all(math.isfinite(gpu.bandwidth_bytes_per_second or 1.0) for gpu in CATALOG)


def test_level_2_caches_are_those_that_torch_reports() -> None:
    """In bytes, from MiB; inductor takes a buffer as large (planner/memory/decoder/buffer_reuse.py)."""
    known = {name: CATALOG.get(name).l2_cache_bytes for name in ("h100-80gb", "rtx-4090", "rtx-2080-ti")}
    assert known == {"h100-80gb": 50 * 2**20, "rtx-4090": 72 * 2**20, "rtx-2080-ti": 11 * 2**19}
    assert [gpu.id for gpu in CATALOG if gpu.l2_cache_bytes is None] == ["gh200-96gb"]
