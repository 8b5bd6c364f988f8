"""What makes torch and trainings cheap in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The tests' tensors are small, and threads that wait for each other cost more."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _unquiet_heap() -> Iterator[dict[str, Any]]:
    """Trainings leave frozen what is (tests/conftest.py), and freeze no model that is to go with its test."""
    heap = pytest.importorskip("launcher.training.callbacks", exc_type=ImportError).QuietHeap
    own = {name: getattr(heap, name) for name in ("on_train_begin", "on_train_end")}
    with pytest.MonkeyPatch.context() as patch:
        for name in own:
            patch.setattr(heap, name, lambda *_, **__: None)
        yield own


@pytest.fixture
def quiet_heap(_unquiet_heap: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainings see to Python's heap as they do in a process of their own."""
    for name, own in _unquiet_heap.items():
        monkeypatch.setattr(f"launcher.training.callbacks.QuietHeap.{name}", own)
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()
