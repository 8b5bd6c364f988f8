"""The checks, in the order in which a person mends them: what they name is all that is told of a machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from launcher.doctor.finding import FAULT, LIMIT, OK, Finding
from launcher.doctor.imported import Imported
from launcher.runs.folder import default_root
from launcher.runs.stack import NEEDED
from planner.gpus.detect import LocalGpu, NoGpuError, driver_version, local_gpus
from planner.gpus.spec import GpuSpec
from planner.memory.measured.files import coefficients_for
from planner.setup.card_limits import torch_build
from planner.setup.cuda_allocator import planned_allocator

LEAST_FREE_BYTES = 20 * 2**30
"""Disk below which a 7B in 16 bits (15 GB) with its checkpoints does not go."""
_GIB = 2**30
_REQUIREMENT = re.compile(r"([\w.-]+)\s*>=\s*([\d.]+)\s*;\s*extra\s*==\s*['\"]train['\"]")
_INSTALL = "pip install -U 'vramwise[train]'"


def program() -> Finding:
    """This program, Python and the system."""
    try:
        version = metadata.version("vramwise")
    except metadata.PackageNotFoundError:
        version = "from a source tree"
    system = f"{platform.system()} {platform.release()}"
    found = f"{version}, Python {platform.python_version()}, {system}"
    if platform.system() == "Linux":
        return Finding(name="vramwise", state=OK, found=found)
    return Finding(name="vramwise", state=LIMIT, found=f"{found}; runs are launched on Linux alone")


def driver() -> tuple[Finding, tuple[LocalGpu, ...]]:
    """NVIDIA's driver, and the GPUs that a training would see."""
    try:
        version, gpus = driver_version(), local_gpus()
    except NoGpuError as error:
        found = f"no NVIDIA GPU ({error.reason}): plans alone, for a card that is named"
        to_type = "vramwise plan --model llama-3.1-8b --gpu 16GB"
        return Finding(name="driver", state=LIMIT, found=found, to_type=to_type), ()
    return Finding(name="driver", state=OK, found=version), gpus


def cards(gpus: tuple[LocalGpu, ...]) -> Iterator[Finding]:
    """Each GPU, its memory, and who holds it."""
    for gpu in gpus:
        found = f"{gpu.spec.name}, {gpu.free_bytes / _GIB:.1f} of {gpu.spec.usable_bytes / _GIB:.1f} GiB free"
        if gpu.display_active:
            found += ", a display on it"
        held = gpu.free_bytes < gpu.spec.usable_bytes // 2
        yield Finding(
            name=f"GPU {gpu.index}",
            state=LIMIT if held else OK,
            found=f"{found}; others hold most of it" if held else found,
            to_type="nvidia-smi" if held else None,
        )


def packages() -> Iterator[Finding]:
    """Releases of the training stack beside the least that is needed and those that the figures rest on."""
    least = _least()
    proven = dict(coefficients_for(None, planned_allocator()).stack_versions)
    missing, older, other, found = [], [], [], []
    for name in NEEDED:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        found.append(f"{name} {version}")
        if name in least and _numbers(version) < _numbers(least[name]):
            older.append(f"{name} {version} (at least {least[name]})")
        elif name in proven and _numbers(version)[:2] != _numbers(proven[name])[:2]:
            other.append(f"{name} {version} (measured with {proven[name]})")
    if missing:
        yield Finding(
            name="packages",
            state=LIMIT if len(missing) == len(NEEDED) else FAULT,
            found=f"not installed: {', '.join(missing)}",
            to_type=_INSTALL,
        )
    if older:
        yield Finding(name="packages", state=FAULT, found=f"too old: {', '.join(older)}", to_type=_INSTALL)
    if found and not missing and not older:
        yield Finding(name="packages", state=OK, found=", ".join(found))
    if other:
        yield Finding(
            name="releases",
            state=LIMIT,
            found=f"the memory figures were measured with others: {', '.join(other)}",
            to_type="vramwise calibrate",
        )


def torch(imported: Imported, gpus: tuple[LocalGpu, ...]) -> Finding:
    """Whether torch's build has kernels for each card that is here."""
    if imported.failure is not None:
        return Finding(name="torch", state=FAULT, found=imported.failure, to_type=_INSTALL)
    built = f"built for CUDA {imported.torch_cuda}" if imported.torch_cuda else "built without CUDA"
    found = f"{imported.torch}, {built}"
    if not gpus:
        return Finding(name="torch", state=OK, found=found)
    if imported.torch_cuda is None:
        to_type = "pip install --force-reinstall torch"
        return Finding(name="torch", state=FAULT, found=f"{found}, and a GPU is here", to_type=to_type)
    lacking = [gpu.spec for gpu in gpus if not has_kernels(imported.architectures, gpu.spec)]
    if lacking:
        why = torch_build(lacking[0]) or f"has no kernels for {lacking[0].name}"
        return Finding(name="torch", state=FAULT, found=f"{found}; {why}")
    if not imported.sees_cuda:
        return Finding(
            name="torch",
            state=FAULT,
            found=f"{found}, and sees no GPU: the driver is older than that CUDA, or CUDA_VISIBLE_DEVICES",
            to_type="nvidia-smi",
        )
    return Finding(name="torch", state=OK, found=found)


def has_kernels(architectures: tuple[str, ...], gpu: GpuSpec) -> bool:
    """Whether a build has machine code for a card (of its generation, and no newer than it), or PTX that its
    driver compiles (of any older one): CUDA C++ Programming Guide, binary and PTX compatibility.
    """
    major, minor = gpu.compute_capability
    for one in architectures:
        kind, _, number = one.partition("_")
        digits = re.match(r"\d+", number)
        if digits is None:
            continue
        its = divmod(int(digits[0]), 10)
        if kind == "sm" and its[0] == major and its[1] <= minor:
            return True
        if kind == "compute" and its <= (major, minor):
            return True
    return False


def bitsandbytes(imported: Imported) -> Finding:
    """Whether bitsandbytes' own library could be loaded: QLoRA and 8-bit optimizers need it."""
    if imported.bitsandbytes:
        return Finding(name="bitsandbytes", state=OK, found="its library is loaded")
    found = "not installed" if imported.bitsandbytes is None else "its library cannot be loaded"
    to_type = _INSTALL if imported.bitsandbytes is None else "python -m bitsandbytes"
    return Finding(name="bitsandbytes", state=FAULT, found=found, to_type=to_type)


def folders(runs: Path | None = None) -> Iterator[Finding]:
    """Where runs and models are kept: written to, and with how much room."""
    root = default_root() if runs is None else runs
    yield _folder("runs", root, "vramwise runs --runs FOLDER")
    yield _folder("models", _hub_cache(), "export HF_HOME=FOLDER")


def _folder(name: str, path: Path, elsewhere: str) -> Finding:
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    shown = _without_home(path)
    if not os.access(there, os.W_OK):
        return Finding(name=name, state=FAULT, found=f"{shown} cannot be written to", to_type=elsewhere)
    free = shutil.disk_usage(there).free
    found = f"{shown}, {free / _GIB:.0f} GiB free"
    if free < LEAST_FREE_BYTES:
        return Finding(name=name, state=LIMIT, found=f"{found}: too little for a 7B", to_type=elsewhere)
    return Finding(name=name, state=OK, found=found)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _without_home(path: Path) -> str:
    """A path for a report that is sent on: the person's home as ~."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _least() -> dict[str, str]:
    """The least release of each package of the extra `train`, as the installed distribution says."""
    try:
        required = metadata.requires("vramwise") or []
    except metadata.PackageNotFoundError:
        return {}
    return {found[1]: found[2] for line in required if (found := _REQUIREMENT.match(line))}


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a release, which order releases: 2.13.0+cpu is 2, 13, 0."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
