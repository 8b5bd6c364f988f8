"""What all tests share."""

from __future__ import annotations

import gc
import os
import platform
import resource
import signal
import sys
import time
import zlib
from collections.abc import Generator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from planner.setup.cuda_allocator import VARIABLES
from tests.bfloat16 import multiply_in_float32_without_units

FEW_COLLECTIONS = (200_000, 20, 20)
"""Of garbage: what is new is looked through 300 times as seldom as by Python's own threshold of 700 objects,
which took a fifth of the time of importing torch, and a quarter of a test's that opens an app."""

CPU_SECONDS_OF_A_TEST = 20.0
"""That a test may take unless it is marked slow; its fixtures, which others share, are not counted."""

# A job started in the background inherits an ignored SIGINT, one under nohup an ignored SIGHUP, and so would
# the processes that tests interrupt.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

# Plans are for the allocator that the environment asks for: here for what suits the machine.
for _name in VARIABLES:
    os.environ.pop(_name, None)


def pytest_configure(config: pytest.Config) -> None:
    """Have torch compile in this process, and keep what it compiled for other workers and later runs; collect
    garbage seldom, from the imports on."""
    gc.set_threshold(*FEW_COLLECTIONS)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    kept = config.rootpath / ".pytest_cache" / "torchinductor" / _compiler()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))


def _compiler() -> str:
    """What compiled code is for: torch, Python, and the processor, whose instructions it uses."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"
    processors = Path("/proc/cpuinfo")
    flags = processors.read_bytes() if processors.exists() else platform.processor().encode()
    flags = next((line for line in flags.splitlines() if line.startswith(b"flags")), flags)
    return f"torch-{torch}-{sys.implementation.cache_tag}-{zlib.crc32(flags):08x}"


FITTED = ("docs", "memory_records", "throughput_fit")
FORKED = (
    *("faults/test_engine", "faults/test_evaluation", "faults/test_file_systems"),
    *("faults/test_full_disk",),
    *("faults/test_launcher_faults", "faults/test_out_of_memory", "faults/test_several_ranks"),
    *("faults/test_torchrun", "stack/test_compiled_shards", "stack/test_several_gpus"),
)
TOGETHER = {
    **{f"tests/unit/test_{name}.py": "tests/unit/test_accuracy.py" for name in FITTED},
    **{f"tests/{name}.py": "tests/faults/test_resume.py" for name in FORKED},
}
"""Files that ask the same of the planner, which takes seconds and is then remembered by the process, and
files that fork trainers from one, which takes ten seconds to import the training stack."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file's tests in one worker, in the order of collection: what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that have slow tests come first, so that no worker begins one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Tests that compute have imported torch by now: what is imported stays, and the trainer's collections of
    garbage, half a second each, need not look at it."""
    gc.collect()
    gc.freeze()
    if "torch" in sys.modules:
        multiply_in_float32_without_units()


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for: load makes it no longer."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a test that takes long without saying so, but where tracing makes all of them slow."""
    before = cpu_seconds()
    try:
        yield
    except BaseException:
        if "tests.forks" in sys.modules:
            sys.modules["tests.forks"].kill_what_is_left()
        raise
    spent = cpu_seconds() - before
    traced = item.config.pluginmanager.hasplugin("_cov")
    exempt = traced or any(item.get_closest_marker(mark) is not None for mark in ("slow", "gpu"))
    if spent > CPU_SECONDS_OF_A_TEST and not exempt:
        pytest.fail(
            f"{spent:.0f} s of CPU time where {CPU_SECONDS_OF_A_TEST:.0f} are allowed: mend or mark slow",
            pytrace=False,
        )


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The settings of whoever runs the tests say nothing here, and no test changes them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user-config"))
