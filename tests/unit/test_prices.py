"""Refreshed prices: downloaded by gpuhunt's classes from a folder, kept, and told with their day."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.gpus.catalog import gpu_catalog

gpuhunt = pytest.importorskip("gpuhunt")

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def shipped_catalog_afterwards() -> Iterator[None]:
    yield
    gpu_catalog.cache_clear()


def offer(name: str, memory: float, price: float, **more: Any) -> Any:
    values = {"instance_name": "one", "location": "here", "cpu": 8, "memory": 32.0, "gpu_count": 1}
    values |= {
        "provider": "",
        "spot": False,
        "disk_size": None,
        "gpu_vendor": gpuhunt.AcceleratorVendor.NVIDIA,
    }
    return gpuhunt.CatalogItem(gpu_name=name, gpu_memory=memory, price=price, **{**values, **more})


def publish(root: Path, provider: str, version: str, offers: list[Any]) -> None:
    """A list as gpuhunt's collectors publish it, written by its own code."""
    from gpuhunt._internal import storage

    folder = root / provider / version
    folder.mkdir(parents=True)
    storage.dump(offers, str(folder / f"{provider}.csv"))
    with zipfile.ZipFile(folder / "catalog.zip", "w") as archive:
        archive.write(folder / f"{provider}.csv", f"{provider}.csv")
    (root / provider / "version").write_text(version)


def plan(cli: Cli, *arguments: str) -> dict[str, Any]:
    gpu_catalog.cache_clear()
    done = cli("plan", "llama-3.2-1b", *arguments, "--method", "qlora", "--max-length", "512", "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)["gpu"]["spec"]
    return found


def test_prices_are_kept_and_told_with_their_day(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "lists"
    eight = offer("RTX4090", 24.0, 1.6, gpu_count=8)
    dear = [offer("RTX4090", 24.0, 0.5), offer("H100", 80.0, 16.0, gpu_count=8), eight]
    publish(root, "runpod", "20270102-7", dear)
    cheap = [offer("RTX4090", 24.0, 0.1, spot=True), offer("RTX4090", 24.0, 0.44), offer("T4", 16.0, 0.0)]
    publish(root, "verda", "20270101-1", cheap)
    publish(root, "aws", "20200101-1", [offer("L40S", 48.0, 0.01), offer("T4", 15.0, 0.1)])
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", root.as_uri())

    # Six providers have nothing there: what the others list counts.
    done = cli("gpus", "4090", "--update-prices")
    assert done.code == 0
    assert "3 prices of 2020-01-01 to 2027-01-02 (aws, runpod, verda; gpuhunt " in done.err
    assert done.err.count("\n") == 1
    assert "0.44" in done.out
    # The lowest of one GPU on demand: not a spot's, nor an eighth of what is rented as eight.
    assert plan(cli, "rtx-4090")["price_source"].startswith("verda, on-demand, 2027-01-01, by gpuhunt ")
    assert plan(cli, "h100-80gb")["price_usd_per_hour"] == 2.0
    # A list that is older than the catalog's price does not replace it.
    assert plan(cli, "l40s")["price_usd_per_hour"] != 0.01
    gpu_catalog.cache_clear()
    assert "2027-01-01" in cli("plan", "llama-3.2-1b", "rtx-4090", "--max-length", "512").out

    # Nothing is touched where nothing can be loaded, and a broken file is named.
    kept = tmp_path / "user-data" / "prices.json"
    before = kept.read_bytes()
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", (tmp_path / "nowhere").as_uri())
    done = cli("gpus", "--update-prices")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("vramwise: --update-prices: gpuhunt could not load a list (")
    assert done.err.count("\n") == 1
    assert kept.read_bytes() == before
    kept.write_text(kept.read_text().replace("2027-01-01", "someday"))
    gpu_catalog.cache_clear()
    done = cli("plan", "llama-3.2-1b", "rtx-4090")
    assert done.code == 2
    assert "prices.json: listed: 'someday' is not accepted; expected a day as YYYY-MM-DD" in done.err
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", root.as_uri())
    assert cli("gpus", "4090", "--update-prices").code == 0


def test_without_gpuhunt_the_extra_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    done = cli("gpus", "--update-prices")
    assert done.code == 1
    assert done.err.endswith(
        "--update-prices needs gpuhunt; install it with: pip install 'vramwise[prices]'\n"
    )
