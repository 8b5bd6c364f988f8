"""hardware.py against a stand-in for pynvml: what NVML answers on various machines."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from planner.base.errors import ExitCode, InputError
from planner.gpus.catalog import gpu_catalog
from planner.gpus.detect import NoGpuError, bandwidth_from_memory_clock, local_gpus, visible_indices
from planner.gpus.spec import MIB


class NVMLError(Exception):
    pass


class FakeNvml:
    """The calls of nvidia-ml-py that hardware.py makes, answered from plain dictionaries."""

    NVMLError = NVMLError
    NVMLError_NotSupported = type("NVMLError_NotSupported", (NVMLError,), {})
    NVMLError_FunctionNotFound = type("NVMLError_FunctionNotFound", (NVMLError,), {})
    NVMLError_NoPermission = type("NVMLError_NoPermission", (NVMLError,), {})
    NVMLError_ArgumentVersionMismatch = type("NVMLError_ArgumentVersionMismatch", (NVMLError,), {})
    NVML_CLOCK_MEM = 2
    nvmlMemory_v2 = 0x2000028  # noqa: N815 - NVML's name

    def __init__(self, *devices: dict[str, Any], driver: bool = True, old_driver: bool = False) -> None:
        self.devices = devices
        self.driver = driver
        self.old_driver = old_driver
        self.open_sessions = 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")
        self.open_sessions += 1

    def nvmlShutdown(self) -> None:
        self.open_sessions -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.devices[index]

    def nvmlDeviceGetUUID(self, device: dict[str, Any]) -> str:
        return str(device["uuid"])

    def nvmlDeviceGetName(self, device: dict[str, Any]) -> str | bytes:
        return device["name"]  # type: ignore[no-any-return]

    def nvmlDeviceGetMemoryInfo(self, device: dict[str, Any], version: int | None = None) -> SimpleNamespace:
        total, reserved, used = (device[key] * MIB for key in ("total", "reserved", "used"))
        if version is None:
            return SimpleNamespace(total=total, used=used + reserved)
        if self.old_driver:
            raise self.NVMLError_FunctionNotFound
        return SimpleNamespace(total=total, reserved=reserved, used=used)

    def nvmlDeviceGetDisplayActive(self, device: dict[str, Any]) -> int:
        return self._answer(device, "display")  # type: ignore[no-any-return]

    def nvmlDeviceGetComputeRunningProcesses(self, device: dict[str, Any]) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=used if used is None else used * MIB)
            for pid, used in self._answer(device, "processes")
        ]

    def nvmlDeviceGetGraphicsRunningProcesses(self, device: dict[str, Any]) -> list[SimpleNamespace]:
        return []

    def nvmlDeviceGetCudaComputeCapability(self, device: dict[str, Any]) -> tuple[int, int]:
        return device["capability"]  # type: ignore[no-any-return]

    def nvmlDeviceGetMemoryBusWidth(self, device: dict[str, Any]) -> int:
        return self._answer(device, "bus")  # type: ignore[no-any-return]

    def nvmlDeviceGetMaxClockInfo(self, device: dict[str, Any], kind: int) -> int:
        assert kind == self.NVML_CLOCK_MEM
        return self._answer(device, "clock")  # type: ignore[no-any-return]

    def _answer(self, device: dict[str, Any], key: str) -> Any:
        if key not in device:
            raise self.NVMLError_NotSupported
        return device[key]


def h100(number: int = 0, **changes: Any) -> dict[str, Any]:
    facts = {
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": f"GPU-{number}aaa",
        "total": 81559,
        "reserved": 480,
        "used": 0,
    }
    return facts | {"display": 0, "processes": []} | changes


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml) -> FakeNvml:
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    return fake


def test_a_card_of_the_catalog_with_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeNvml(h100(used=1500, processes=[(42, 1480)])))
    (gpu,) = local_gpus()
    assert gpu.in_catalog
    assert gpu.spec.id == "h100-80gb"
    assert gpu.spec.usable_bytes == 81079 * MIB
    assert gpu.spec.usable_is_measured
    assert gpu.used_bytes == 1500 * MIB
    assert gpu.free_bytes == (81079 - 1500) * MIB
    assert [(p.pid, p.used_bytes) for p in gpu.processes] == [(42, 1480 * MIB)]
    assert gpu.display_active is False
    assert fake.open_sessions == 0


def test_two_cards_of_one_name_are_told_apart_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"name": b"NVIDIA GeForce RTX 4060 Ti", "reserved": 300, "used": 700, "display": 1}
    use(
        monkeypatch,
        FakeNvml(card | {"uuid": "GPU-a", "total": 16380}, card | {"uuid": "GPU-b", "total": 8188}),
    )
    first, second = local_gpus()
    assert (first.spec.id, second.spec.id) == ("rtx-4060-ti-16gb", "rtx-4060-ti-8gb")
    assert first.display_active


def test_an_unlisted_card_is_described_from_what_nvml_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"name": "NVIDIA B300", "uuid": "GPU-x", "total": 275040, "reserved": 800, "used": 0}
    use(monkeypatch, FakeNvml(card | {"capability": (10, 3), "bus": 8192, "clock": 3996}))
    (gpu,) = local_gpus()
    assert not gpu.in_catalog
    assert gpu.spec.id == "b300"
    assert gpu.spec.supports_bfloat16
    assert gpu.spec.bandwidth_bytes_per_second == pytest.approx(8.18e12, rel=0.01)
    assert gpu.spec.matrix_flops_per_second is None
    assert gpu.processes == ()
    assert gpu.display_active is None


def test_an_old_driver_counts_its_reserve_as_used(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml(h100(used=0), old_driver=True))
    (gpu,) = local_gpus()
    assert not gpu.spec.usable_is_measured
    assert gpu.used_bytes == 0
    assert gpu.free_bytes <= 81079 * MIB


def test_wsl_hides_what_each_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml(h100(used=900, processes=[(7, None)])))
    (gpu,) = local_gpus()
    assert gpu.processes[0].used_bytes is None
    assert gpu.used_bytes == 900 * MIB


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        (None, (0, 1, 2)),
        ("2,0", (2, 0)),
        (" 1 , 2 ", (1, 2)),
        ("GPU-1", (1,)),
        ("0,7,1", (0,)),
        ("0,-1,1", (0,)),
        ("", ()),
        ("-1", ()),
        ("GPU-", ()),
        ("1,1", (1,)),
        ("NoDevFiles", ()),
    ],
)
def test_cuda_visible_devices_as_cuda_reads_it(variable: str | None, indices: tuple[int, ...]) -> None:
    assert visible_indices(variable, ("GPU-0aaa", "GPU-1aaa", "GPU-2aaa")) == indices


def test_hidden_gpus_are_not_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml(h100(0), h100(1)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.index for gpu in local_gpus()] == [1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(NoGpuError, match="CUDA_VISIBLE_DEVICES"):
        local_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    with pytest.raises(InputError, match="MIG"):
        local_gpus()


@pytest.mark.parametrize(
    "fake", [FakeNvml(driver=False), FakeNvml(), None], ids=["no driver", "no GPU", "no pynvml"]
)
def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    with pytest.raises(NoGpuError) as caught:
        local_gpus()
    assert caught.value.exit_code is ExitCode.BAD_INPUT
    assert "\n" not in str(caught.value)
    assert "--gpu 16GB" in str(caught.value)


@pytest.mark.parametrize(
    ("id_", "bus", "clock"),
    [
        ("rtx-4090", 384, 10501),
        ("a100-40gb", 5120, 1215),
        ("rtx-3060-12gb", 192, 7501),
        ("rtx-5090", 512, 14001),
    ],
)
def test_bandwidth_from_nvmls_clock_agrees_with_the_catalog(id_: str, bus: int, clock: int) -> None:
    published = gpu_catalog().get(id_).bandwidth_bytes_per_second
    assert bandwidth_from_memory_clock(bus, clock) == pytest.approx(published, rel=0.01)
