"""The doctor: what it says of machines that are and are not well, and what it never says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launcher import cli
from launcher.doctor import checks, command
from launcher.doctor.finding import FAULT, LIMIT, OK
from launcher.doctor.imported import Imported
from planner.gpus.catalog import gpu_catalog
from planner.gpus.detect import LocalGpu, NoGpuError

CUDA = Imported(
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
    sees_cuda=True,
    bitsandbytes=True,
)


def local(name: str, used_bytes: int = 0) -> LocalGpu:
    return LocalGpu(
        index=0,
        uuid="GPU-12345678-1234",
        spec=gpu_catalog().get(name),
        in_catalog=True,
        used_bytes=used_bytes,
        processes=(),
        display_active=False,
    )


@pytest.mark.parametrize(
    ("name", "has"),
    [("rtx-4090", True), ("rtx-5090", True), ("t4", True), ("v100-32gb", False), ("h200", True)],
)
def test_kernels_are_those_of_the_card_s_generation(name: str, has: bool) -> None:
    assert checks.has_kernels(CUDA.architectures, gpu_catalog().get(name)) is has


def test_a_ptx_of_an_older_generation_is_compiled() -> None:
    assert checks.has_kernels(("sm_70", "compute_70"), gpu_catalog().get("rtx-5090"))
    assert not checks.has_kernels(("sm_90", "compute_90"), gpu_catalog().get("a100-80gb"))


@pytest.mark.parametrize(
    ("imported", "card", "state", "said"),
    [
        (CUDA, "rtx-4090", OK, "CUDA 13.0"),
        (CUDA, "v100-32gb", FAULT, "CUDA 12.6"),
        (dataclasses.replace(CUDA, torch_cuda=None), "rtx-4090", FAULT, "without CUDA"),
        (dataclasses.replace(CUDA, sees_cuda=False), "rtx-4090", FAULT, "sees no GPU"),
        (Imported(failure="ImportError: libcudart"), "rtx-4090", FAULT, "libcudart"),
    ],
)
def test_torch_is_held_to_the_card(imported: Imported, card: str, state: str, said: str) -> None:
    found = checks.torch(imported, (local(card),))
    assert found.state == state
    assert said in found.found


def test_packages_that_are_too_old_or_missing_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.metadata.version
    monkeypatch.setattr(checks.metadata, "version", lambda name: "0.9.1" if name == "peft" else real(name))
    monkeypatch.setattr(
        checks.metadata, "requires", lambda _: ['peft>=0.21.2; extra == "train"', "rich>=13.7"]
    )
    (old,) = (one for one in checks.packages() if one.state == FAULT)
    assert "peft 0.9.1 (at least 0.21.2)" in old.found

    def missing(name: str) -> str:
        if name == "trl":
            raise checks.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(checks.metadata, "version", missing)
    assert [one.found for one in checks.packages() if one.state == FAULT] == ["not installed: trl"]


def test_a_gpu_that_others_hold_and_a_folder_that_is_read_only_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (held,) = checks.cards((local("rtx-4090", used_bytes=20 * 2**30),))
    assert (held.state, "others hold" in held.found) == (LIMIT, True)
    # Not by its mode: root may write everywhere.
    monkeypatch.setattr(checks.os, "access", lambda path, mode: Path(path) != tmp_path)
    found = next(iter(checks.folders(tmp_path / "runs")))
    assert (found.name, found.state) == ("runs", FAULT)


SECRETS = {"HF_TOKEN": "hf_hushhush", "WANDB_API_KEY": "wandbhush", "AWS_SECRET_ACCESS_KEY": "awshush"}


def test_without_a_gpu_plans_are_offered_and_nothing_secret_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "person"))
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "person" / "data"))

    def none() -> tuple[LocalGpu, ...]:
        raise NoGpuError("none here")

    monkeypatch.setattr(checks, "driver_version", none)
    monkeypatch.setattr(command, "ask", lambda: Imported(torch="2.13.0", bitsandbytes=True))
    assert cli.run(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    states = {one["name"]: one["state"] for one in found["findings"]}
    assert (states["driver"], states["torch"], states["bitsandbytes"]) == (LIMIT, OK, OK)
    assert found["next"].startswith("vramwise plan")
    assert not any(secret in out for secret in (*SECRETS.values(), str(tmp_path / "person")))
    assert "~/data/runs" in out


def test_what_to_type_mends_the_first_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "driver_version", lambda: "580.95 (CUDA 13.0)")
    monkeypatch.setattr(checks, "local_gpus", lambda: (local("rtx-4090"),))
    monkeypatch.setattr(
        command, "ask", lambda: dataclasses.replace(CUDA, torch_cuda=None, bitsandbytes=False)
    )
    assert cli.run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "next: pip install --force-reinstall torch" in out
    assert "python -m bitsandbytes" in out
    monkeypatch.setattr(command, "ask", lambda: CUDA)
    assert cli.run(["doctor"]) == 0
    assert "next: vramwise" in capsys.readouterr().out


@pytest.mark.slow
def test_this_machine_s_own_packages_answer() -> None:
    from launcher.doctor.imported import ask

    found = ask()
    assert found.failure is None
    assert found.torch is not None
    assert found.bitsandbytes is True
