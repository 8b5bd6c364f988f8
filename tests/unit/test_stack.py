"""The training stack's packages: what a run needs, and what a record says of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import stack
from launcher.tui import starting
from launcher.tui.cards import card_from_text
from launcher.tui.sizing import size_up
from planner.base.errors import FieldError, MissingExtraError
from planner.models.catalog import resolve_model
from planner.setup.stack import TRL
from planner.setup.training_setup import TrainingSetup

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in packages else find(name, *rest)
    )


def test_the_extra_installs_all_that_is_needed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(stack.NEEDED) <= {line.partition(">")[0] for line in extras["train"]}


def test_all_that_is_missing_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in stack.NEEDED:
        pytest.importorskip(package)
    without(monkeypatch, "trl", "psutil")
    done = cli("train", "--model", "qwen2.5-0.5b", "--gpu", "16GB", "--data", tmp_path / "data.jsonl")
    assert "train needs trl, psutil" in done.err
    assert "vramwise[train]" in done.err
    setup = TrainingSetup(model="qwen2.5-0.5b", max_length=512)
    sizing = size_up(setup, resolve_model(setup.model), card_from_text("16GB"))
    with pytest.raises(MissingExtraError, match="training needs trl, psutil"):
        starting.refuse_what_cannot_start(sizing)


def test_a_record_carries_the_versions_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(package: str) -> str:
        if package in ("liger-kernel", "bitsandbytes"):
            raise metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(metadata, "version", installed)
    assert stack.versions() == tuple(
        (package, "1.0") for package in TRL.packages if package != "bitsandbytes"
    )


def test_a_stack_has_packages() -> None:
    with pytest.raises(FieldError, match="at least one package"):
        dataclasses.replace(TRL, packages=())
