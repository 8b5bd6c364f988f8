"""Optimizer state: the memory model against what real steps leave, and TRL's output head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import bitsandbytes as bnb
import torch
from bitsandbytes import functional

from planner.memory.allocators.native import rounded
from planner.memory.held.optimizer import MIN_8BIT_ELEMENTS, MIN_PAGED_ELEMENTS, optimizer_memory
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

from .test_adapter import demo_spec
from .test_build import make_trainer

OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adamw_8bit", "lion_8bit"]


@pytest.fixture(autouse=True)
def _forget_overrides() -> None:
    """bitsandbytes keeps 32-bit overrides (of embeddings) in a singleton, by position in the optimizer."""
    bnb.optim.GlobalOptimManager.get_instance().initialize()


def state_bytes(optimizer: Any) -> int:
    """Bytes of the state's tensors, each rounded as CUDA's allocator does; shared ones once."""
    inner = getattr(optimizer, "optimizer", optimizer)
    found: dict[int, int] = {}
    for state in inner.state.values():
        for name, value in state.items():
            # The step count is a CPU tensor, but for the fused AdamW on a GPU, which has it there.
            counted = name != "step" or bool(inner.defaults.get("fused"))
            if isinstance(value, torch.Tensor) and counted:
                found[value.untyped_storage().data_ptr()] = rounded(value.numel() * value.element_size())
    return sum(found.values())


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_state_after_a_step(optim: str, method: str, tmp_path: Path) -> None:
    setup = TrainingSetup(
        model="demo", max_length=64, per_device_train_batch_size=2, method=method, optim=optim
    )
    trainer = make_trainer(setup, tmp_path, max_steps=1)
    optimizer = trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01) if parameter.requires_grad else None
    optimizer.step()
    expected = optimizer_memory(optim, TrainingRun(setup=setup, model=demo_spec()).trained)
    assert expected.managed_bytes == 0
    assert expected.allocated_bytes == state_bytes(optimizer)


def test_8_bit_state_begins_at_4096_elements() -> None:
    for elements, dtype in ((MIN_8BIT_ELEMENTS - 1, torch.float32), (MIN_8BIT_ELEMENTS, torch.uint8)):
        parameter = torch.nn.Parameter(torch.zeros(elements))
        parameter.grad = torch.ones_like(parameter)
        optimizer = bnb.optim.AdamW8bit([parameter])
        optimizer.step()
        assert optimizer.state[parameter]["state1"].dtype == dtype


def test_paging_begins_at_100_000_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedError(Exception):
        pass

    def ask(*shape: int, **kwargs: Any) -> None:
        raise AskedError

    monkeypatch.setattr(functional, "get_paged", ask)
    paged = bnb.optim.PagedAdamW8bit([torch.nn.Parameter(torch.zeros(1))])
    # On the CPU nothing is paged; the meta device takes the branch that a GPU takes.
    paged.get_state_buffer(torch.zeros(MIN_PAGED_ELEMENTS - 1, device="meta"))
    with pytest.raises(AskedError):
        paged.get_state_buffer(torch.zeros(MIN_PAGED_ELEMENTS, device="meta"))
