"""Random numbers of ranks in checkpoints: each goes on with its own, and with another number of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.training.several import random_states
from launcher.training.several.random_states import ONE_PROCESS, as_file, file_of, random_state, restore
from planner.base.errors import InputError


class Gpu:
    """A GPU's generator where there is no GPU: the state that torch.cuda would give and take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state: Any = torch.zeros(16, dtype=torch.uint8)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: self.state)
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: setattr(self, "state", state))


@pytest.fixture(autouse=True)
def own_numbers() -> Iterator[None]:
    before = random_state()
    yield
    random_states.set_random_state(before)


def draw_as(rank: int, gpu: Gpu | None) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    if gpu is not None:
        gpu.state = torch.full((16,), rank, dtype=torch.uint8)


def saved(folder: Path, ranks: int, gpu: Gpu | None) -> Path:
    for rank in range(ranks):
        draw_as(rank, gpu)
        (folder / file_of(rank)).write_bytes(as_file())
    draw_as(0, gpu)
    (folder / ONE_PROCESS).write_bytes(as_file())
    if ranks == 1:
        (folder / file_of(0)).unlink()
    draw_as(99, gpu)
    return folder


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.mark.parametrize(
    ("before", "rank", "taken"), [(2, 0, 0), (2, 1, 1), (2, 2, 0), (2, 3, 1), (4, 1, 1), (1, 0, 0), (1, 3, 0)]
)
def test_a_rank_goes_on_with_its_own_and_a_new_one_with_another_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, rank: int, taken: int
) -> None:
    gpu = Gpu(monkeypatch)
    saved(tmp_path, before, gpu)
    restore(tmp_path, rank)
    assert gpu.state.tolist() == [taken] * 16
    found = drawn()
    draw_as(taken, gpu)
    assert found == drawn()


def test_a_gpu_that_the_checkpoint_does_not_know_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 2, None)
    gpu = Gpu(monkeypatch)
    gpu.state = torch.full((16,), 7, dtype=torch.uint8)
    restore(tmp_path, 1)
    assert gpu.state.tolist() == [7] * 16


def test_a_checkpoint_without_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no random states"):
        restore(tmp_path, 0)


def test_one_process_reads_what_several_have_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers' own loader, whose errors about a GPU's state are but logged."""
    from types import SimpleNamespace

    from transformers import Trainer
    from transformers.training_args import ParallelMode

    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda.random, "set_rng_state", torch.cuda.set_rng_state)
    saved(tmp_path, 2, gpu)
    alone: Any = SimpleNamespace(
        args=SimpleNamespace(world_size=1, parallel_mode=ParallelMode.NOT_DISTRIBUTED)
    )
    Trainer._load_rng_state(alone, str(tmp_path))
    assert gpu.state.tolist() == [0] * 16
    found = drawn()
    draw_as(0, gpu)
    assert found == drawn()
