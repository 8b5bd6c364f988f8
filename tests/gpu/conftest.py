"""Tests marked `gpu` run when `-m` names the mark, and on a card that their runs fit on."""

from __future__ import annotations

import pytest

from planner.gpus.detect import NoGpuError, local_gpus

LEAST_BYTES = 8 * 10**9


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "gpu" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; opt in with -m gpu"))


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    """Skip where there is no suitable card, without a CUDA context of this process: others are measured."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA GPU")
    try:
        gpu = local_gpus()[0].spec
    except NoGpuError as error:
        pytest.skip(str(error))
    if gpu.memory_bytes < LEAST_BYTES:
        pytest.skip(f"{gpu.name} has less than 8 GB")
    if not gpu.supports_bfloat16:
        pytest.skip(f"{gpu.name} has no bfloat16, which these runs train in")
