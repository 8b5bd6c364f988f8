"""GPUs of this machine and what other processes hold on them: the only module that imports pynvml."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from planner.base.errors import InputError
from planner.base.values import dataclass
from planner.gpus.catalog import gpu_catalog, normalise
from planner.gpus.spec import GpuSpec, has_native_bfloat16, reserved_bytes_upper_bound


class NoGpuError(InputError):
    """This machine has no GPU that a training process could see."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"no NVIDIA GPU found ({reason}); name one with --gpu, for example --gpu 16GB")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU; `used_bytes` is None where the driver does not say (WSL)."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalGpu:
    """One GPU of this machine.

    `index` is NVML's (PCI bus order; CUDA_DEVICE_ORDER=PCI_BUS_ID makes CUDA's the same). `spec` is the
    catalog's card with this GPU's own memory, or one made from NVML's facts (`in_catalog` false).
    `used_bytes` is what is taken now, without what the driver keeps for itself; it counts processes of other
    containers, which `processes` cannot list (under WSL the list is empty as well). `display_active` is None
    where unknown.
    """

    index: int
    uuid: str
    spec: GpuSpec
    in_catalog: bool
    used_bytes: int
    processes: tuple[GpuProcess, ...]
    display_active: bool | None

    @property
    def free_bytes(self) -> int:
        """What a new process can take."""
        return max(0, self.spec.usable_bytes - self.used_bytes)


def local_gpus() -> tuple[LocalGpu, ...]:
    """GPUs that a training process started now would see, CUDA_VISIBLE_DEVICES respected, in its order.

    Raises:
        NoGpuError: no driver, no GPU, or none visible.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NoGpuError("the package nvidia-ml-py is not installed") from error
    with _nvml_session(pynvml):
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            uuids = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        except pynvml.NVMLError as error:
            raise NoGpuError(f"NVML: {error}") from error
        if not handles:
            raise NoGpuError("the driver lists none")
        visible = visible_indices(os.environ.get("CUDA_VISIBLE_DEVICES"), tuple(uuids))
        if not visible:
            raise NoGpuError("CUDA_VISIBLE_DEVICES hides every GPU")
        try:
            return tuple(_local_gpu(pynvml, index, handles[index], uuids[index]) for index in visible)
        except pynvml.NVMLError as error:
            raise NoGpuError(f"NVML: {error}") from error


def driver_version() -> str:
    """NVIDIA's driver and the newest CUDA that it runs: "580.95 (CUDA 13.0)".

    Raises:
        NoGpuError: no driver.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NoGpuError("the package nvidia-ml-py is not installed") from error
    with _nvml_session(pynvml):
        try:
            version = _text(pynvml.nvmlSystemGetDriverVersion())
            cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        except pynvml.NVMLError as error:
            raise NoGpuError(f"NVML: {error}") from error
    return f"{version} (CUDA {cuda // 1000}.{cuda % 1000 // 10})"


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuLoad:
    """What a GPU is doing; None where the driver does not say. `slowed_by` is "heat" or "power" where it has
    lowered its clocks to protect itself; a power limit that it was given and keeps to is no such case.
    """

    utilization_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    slowed_by: str | None = None


def gpu_load(uuid: str) -> GpuLoad:
    """What one GPU of this machine is doing now.

    Raises:
        NoGpuError: the driver does not answer.
    """
    import pynvml

    with _nvml_session(pynvml):
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            used = _optional(pynvml, pynvml.nvmlDeviceGetUtilizationRates, handle)
            degrees = _optional(pynvml, pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
            milliwatts = _optional(pynvml, pynvml.nvmlDeviceGetPowerUsage, handle)
            reasons = _optional(pynvml, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
        except pynvml.NVMLError as error:
            raise NoGpuError(f"NVML: {error}") from error
    hot = pynvml.nvmlClocksThrottleReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    slowed_by = "power" if reasons & pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown else None
    return GpuLoad(
        utilization_percent=None if used is None else float(used.gpu),
        temperature_c=None if degrees is None else float(degrees),
        power_w=None if milliwatts is None else milliwatts / 1000,
        slowed_by="heat" if reasons & hot else slowed_by,
    )


def visible_indices(variable: str | None, uuids: tuple[str, ...]) -> tuple[int, ...]:
    """Indices that CUDA_VISIBLE_DEVICES leaves visible; like CUDA, stop at the first entry that names none.

    Entries are indices or (prefixes of) UUIDs. See "CUDA environment variables" in NVIDIA's CUDA C++
    Programming Guide.

    Raises:
        InputError: a MIG slice, whose memory is not the card's.
    """
    if variable is None:
        return tuple(range(len(uuids)))
    indices: list[int] = []
    for entry in (part.strip() for part in variable.split(",")):
        if entry.startswith("MIG-"):
            raise InputError("CUDA_VISIBLE_DEVICES names a MIG slice, which is not supported; use --gpu")
        if entry.isdecimal():
            found = [int(entry)] if int(entry) < len(uuids) else []
        else:
            found = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(found) != 1 or found[0] in indices:
            break
        indices += found
    return tuple(indices)


def bandwidth_from_memory_clock(bus_width_bits: int, memory_clock_mhz: int) -> float:
    """Bytes/s of the memory: NVML's maximum clock counts half transfers, so two a cycle over the bus.

    RTX 4090: 384 bit x 10,501 MHz -> 1,008 GB/s; A100 40GB: 5,120 x 1,215 -> 1,555; both as published.
    """
    return bus_width_bits / 8 * memory_clock_mhz * 1e6 * 2


@contextlib.contextmanager
def _nvml_session(pynvml: Any) -> Iterator[None]:
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError) as error:
        raise NoGpuError(f"NVML: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _local_gpu(pynvml: Any, index: int, handle: Any, uuid: str) -> LocalGpu:
    total, reserved, used = _memory(pynvml, handle)
    name = _text(pynvml.nvmlDeviceGetName(handle))
    shipped = gpu_catalog().match_driver(name, total)
    usable = max(0, total - (reserved_bytes_upper_bound(total) if reserved is None else reserved))
    if shipped is None:
        spec = _unlisted_gpu(pynvml, handle, name, total, usable, reserved is not None)
    else:
        spec = dataclasses.replace(
            shipped, memory_bytes=total, usable_bytes=usable, usable_is_measured=reserved is not None
        )
    active = _optional(pynvml, pynvml.nvmlDeviceGetDisplayActive, handle)
    return LocalGpu(
        index=index,
        uuid=uuid,
        spec=spec,
        in_catalog=shipped is not None,
        used_bytes=used,
        processes=_processes(pynvml, handle),
        display_active=None if active is None else bool(active),
    )


def _memory(pynvml: Any, handle: Any) -> tuple[int, int | None, int]:
    """Total, what the driver keeps (None with drivers before 510), and what is in use beside that.

    NVML's second version of the call tells the reserve apart; in the first it counts as used.
    """
    second = _optional(pynvml, pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    if second is not None:
        return int(second.total), int(second.reserved), int(second.used)
    first = pynvml.nvmlDeviceGetMemoryInfo(handle)
    total, used = int(first.total), int(first.used)
    return total, None, max(0, used - reserved_bytes_upper_bound(total))


def _processes(pynvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    found: dict[int, GpuProcess] = {}
    for call in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in _optional(pynvml, call, handle) or ():
            used = process.usedGpuMemory
            found[process.pid] = GpuProcess(pid=process.pid, used_bytes=None if used is None else int(used))
    return tuple(found[pid] for pid in sorted(found))


def _unlisted_gpu(
    pynvml: Any, handle: Any, name: str, total: int, usable: int, usable_is_measured: bool
) -> GpuSpec:
    """Spec of a card that is not in the catalog: what NVML knows; the matrix rate stays unknown."""
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    bus_width = _optional(pynvml, pynvml.nvmlDeviceGetMemoryBusWidth, handle)
    clock = _optional(pynvml, pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM)
    bandwidth = bandwidth_from_memory_clock(bus_width, clock) if bus_width and clock else None
    return GpuSpec(
        id=normalise(name) or "gpu",
        name=name,
        memory_bytes=total,
        usable_bytes=usable,
        usable_is_measured=usable_is_measured,
        compute_capability=(major, minor),
        supports_bfloat16=has_native_bfloat16((major, minor)),
        bandwidth_bytes_per_second=bandwidth,
        matrix_flops_per_second=None,
    )


def _optional(pynvml: Any, call: Any, *arguments: Any) -> Any:
    """Ask something that a driver may not answer; None then."""
    try:
        return call(*arguments)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NoPermission):
        return None
    except pynvml.NVMLError_ArgumentVersionMismatch:
        return None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
