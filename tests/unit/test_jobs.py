"""Jobs that rent a card: their limits are the plan's, and the services' own schemas take them (opt-in)."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.answers.plan import Plan
from planner.gpus.catalog import gpu_catalog
from planner.gpus.rented import rented_names
from planner.jobs.job import READY_HOURS, SERVICES, STACK_BYTES, card_name

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "profiles" / "demo" / "data" / "train.jsonl"
PACKAGES = os.environ.get("VRAMWISE_JOB_SERVICES")
"""A folder with the unpacked wheels of skypilot, dstack and gpuhunt, each in one of its name."""


def job(cli: Cli, folder: Path, service: str, *more: str) -> tuple[dict[str, Any], Plan, str]:
    done = cli(
        *("plan", "llama-3.2-1b", "rtx-4090", "--data", DATA, "--job", service, "-o", folder),
        *("--method", "qlora", "--max-length", "512", *more),
    )
    assert done.code == 0, done.err
    (path,) = [path for path in folder.iterdir() if path.name != "plan.json"]
    plan = Plan.from_dict(yaml.safe_load((folder / "plan.json").read_text()))
    return yaml.safe_load(path.read_text()), plan, path.read_text()


def test_limits_are_the_plans(cli: Cli, tmp_path: Path) -> None:
    sky, plan, text = job(cli, tmp_path / "sky", "sky")
    dstack, _, _ = job(cli, tmp_path / "dstack", "dstack", "--price-per-hour", "0.5")
    assert plan.duration is not None
    hours = math.ceil(plan.duration.hours_high + READY_HOURS)
    disk = math.ceil((plan.loading.disk_bytes + STACK_BYTES) / 1e9)
    resources = sky["resources"]
    assert (resources["accelerators"], resources["disk_size"]) == ("RTX4090:1", disk)
    # Twice the listed price where none is named; the named one where it is.
    assert resources["max_hourly_cost"] == round(2 * plan.duration.usd_per_gpu_hour, 2)
    assert dstack["max_price"] == 0.5
    assert dstack["resources"] == {
        "gpu": {"name": "RTX4090", "memory": "24GB", "count": 1},
        "disk": f"{disk}GB..",
    }
    assert dstack["max_duration"] == f"{hours + 3}h"
    command = shlex.split(sky["run"])
    assert command[command.index("timeout") + 3] == f"{hours}h"
    for run, place in ((sky["run"], sky["file_mounts"].values()), (dstack["commands"][1], dstack["files"])):
        assert "vramwise train --plan plan.json --data train.jsonl --runs runs --allow-download" in run
        assert any(str(DATA) in one for one in place)
    assert "after 2 h it is ended, and saves" in text
    assert f"at most {plan.memory.peak_upper_bytes / 2**30:.2f}." in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("rtx-4090",), "--job needs --data"),
        (("rtx-4090", "--data", DATA, "--for", "trl"), "exclude each other"),
        (("titan-rtx", "--data", DATA, "--max-length", "512"), "--job sky has no titan-rtx: it has"),
        (("8GB", "--data", DATA, "--method", "full", "--max-length", "512"), "the plan does not fit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_job_that_cannot_be_is_refused_in_a_line(
    cli: Cli, tmp_path: Path, arguments: tuple[Any, ...], told: str
) -> None:
    done = cli("plan", "llama-3.2-1b", *arguments, "--job", "sky", "-o", tmp_path / "job")
    assert done.code == 2
    assert told in done.err
    assert not (tmp_path / "job").exists()


def test_the_names_are_of_cards_that_are_known() -> None:
    known = rented_names()
    cards = {gpu.id: gpu for gpu in gpu_catalog()}
    assert set(known) <= set(cards)
    for name, services in known.items():
        assert set(services) <= set(SERVICES)
        if "dstack" in services:
            memory = re.fullmatch(r"\w+:(\d+)GB", card_name(name, "dstack"))
            assert memory is not None
            assert int(memory[1]) == pytest.approx(cards[name].memory_bytes / 2**30, rel=0.08)


@pytest.mark.skipif(PACKAGES is None, reason="VRAMWISE_JOB_SERVICES names no folder with unpacked wheels")
def test_services_have_every_card_and_know_every_key(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(PACKAGES or "")
    hunted = (root / "gpuhunt" / "gpuhunt" / "_internal" / "constraints.py").read_text()
    offered = set(re.findall(r'NvidiaGPUInfo\(name="(\w+)", memory=(\d+)', hunted))
    catalog = root / "sky" / "sky" / "catalog"
    sources = [catalog / "__init__.py", *(catalog / "data_fetchers").glob("fetch_*.py")]
    rented = set(re.findall(r"'([A-Z][\w-]+)'", "".join(path.read_text() for path in sources)))
    for services in rented_names().values():
        if "dstack" in services:
            name, _, memory = services["dstack"].partition(":")
            assert (name, memory.removesuffix("GB")) in offered
        assert services.get("sky", "H100") in rented
    schemas = (root / "sky" / "sky" / "utils" / "schemas.py").read_text()
    values, _, _ = job(cli, tmp_path, "sky")
    for key in (*values, *values["resources"], *values["resources"]["autostop"]):
        assert f"'{key}': " in schemas
    profiles = root / "dstack" / "dstack" / "_internal" / "core" / "models"
    known = set(
        re.findall(r"^    (\w+): ", "".join(p.read_text() for p in profiles.glob("*.py")), re.MULTILINE)
    )
    values, _, _ = job(cli, tmp_path / "dstack", "dstack")
    assert {*values, *values["resources"], *values["resources"]["gpu"]} <= known
