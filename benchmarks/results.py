"""Where benchmark results go: one JSON file each, with the machine they were taken on."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


def write_result(name: str, figures: dict[str, Any]) -> None:
    """Write results/NAME.json."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps({**figures, "machine": machine()}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """The machine that results are taken on, and when."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "vramwise": _version(),
        "taken": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _version() -> str | None:
    """Of the installed package; None where a tree is run from its folder, as on a rented machine."""
    try:
        return version("vramwise")
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
