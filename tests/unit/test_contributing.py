"""What CONTRIBUTING.md says of a GPU and of a stack: made-up ones change what they should, and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.gpus import catalog
from planner.gpus.spec import MIB, reserved_bytes_upper_bound
from planner.memory import estimate_memory
from planner.memory.estimate import LiveMemory, live_memory
from planner.memory.measured.files import coefficients_for
from planner.memory.step.timeline import StepMoment
from planner.models.catalog import load_shipped
from planner.search import cards
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.run import TrainingRun
from planner.setup.stack import TRL, Stack
from planner.setup.training_setup import TrainingSetup
from planner.throughput.roofline import estimate_step

CARD = """
[rtx-6060-20gb]
name = "NVIDIA GeForce RTX 6060"
aliases = ["6060"]
memory_mib = 20480
compute_capability = 12.0
bandwidth_gb_per_second = 640
matrix_tflops = 60
sm_count = 40
l2_cache_mib = 32
"""
H100 = catalog.gpu_catalog().get("h100-80gb")
TOKENS = 4096


@pytest.fixture
def made_up_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The shipped catalog with one row more."""
    rows = tmp_path / "gpus.toml"
    rows.write_text(catalog.CATALOG_FILE.read_text(encoding="utf-8") + CARD, encoding="utf-8")
    read = (catalog.gpu_catalog, cards.cards_by_memory)
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "CATALOG_FILE", rows)
        for cached in read:
            cached.cache_clear()
        yield
    for cached in read:
        cached.cache_clear()


@pytest.mark.usefixtures("made_up_card")
def test_a_made_up_card_is_planned_for_listed_and_recognised(cli: Callable[..., Any]) -> None:
    planned = cli("plan", "--model", "llama-3.2-3b", "--gpu", "6060", "--full")
    assert planned.out.startswith("FITS: llama-3.2-3b")
    assert "rtx-6060-20gb" in planned.out
    # No total was seen on such a card, so what it leaves is the rule's.
    usable = 20480 * MIB - reserved_bytes_upper_bound(20480 * MIB)
    assert f"usable         {usable / 2**30:.2f} GiB of the card's 20.00 GiB" in planned.out
    # Its speed follows from its published rates.
    assert "tokens/s          about" in planned.out
    assert "not calibrated on this GPU" in planned.out
    assert "rtx-6060-20gb" in cli("gpus", "6060").out
    found = catalog.gpu_catalog().match_driver("NVIDIA GeForce RTX 6060", 20475 * MIB)
    assert found is not None
    assert found.id == "rtx-6060-20gb"


def of_stack(stack: Stack, **knobs: Any) -> TrainingRun:
    setup = TrainingSetup(model="llama-3.2-1b", max_length=TOKENS, optim="adamw_8bit", **knobs)
    return TrainingRun(setup=setup, model=load_shipped(setup.model), stack=stack)


def live(run: TrainingRun) -> LiveMemory:
    measured = coefficients_for(H100.id, EXPANDABLE)
    return live_memory(run, gpu=H100, coefficients=measured, allocator=EXPANDABLE)


def differences(one: object, other: object) -> dict[str, Any]:
    """The fields in which two values of a dataclass or a named tuple differ: by how much, where they are
    numbers.
    """
    assert dataclasses.is_dataclass(one) or isinstance(one, StepMoment)
    names = one._fields if isinstance(one, StepMoment) else [field.name for field in dataclasses.fields(one)]
    found: dict[str, Any] = {}
    for name in names:
        before, after = getattr(one, name), getattr(other, name)
        if before != after:
            found[name] = after - before if isinstance(before, int) else (before, after)
    return found


def changed_moments(one: TrainingRun, other: TrainingRun) -> dict[str, dict[str, Any]]:
    """The moments of a step in which the two differ, and by how many bytes of what."""
    before, after = (live(run).timeline.moments() for run in (one, other))
    pairs = zip(before, after, strict=True)
    return {moment.name: differences(moment, its) for moment, its in pairs if moment != its}


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_another_tile_changes_the_head_alone(method: str) -> None:
    stack = dataclasses.replace(TRL, head_tokens=1024, head_vocabulary=8192)
    one, other = (of_stack(which, method=method) for which in (TRL, stack))
    # A tile of logits in 16 bits; the last token has no label.
    changed = {"head_bytes": (1024 * 8192 - (TOKENS - 1) * 32_768) * 2}
    head = {f"output head, {way}": changed for way in ("forward", "backward")}
    assert changed_moments(one, other) == head
    assert differences(live(one).resident, live(other).resident) == {}
    assert estimate_step(other, H100) == estimate_step(one, H100)


def test_another_stash_changes_what_offloading_holds_in_forward_alone() -> None:
    stack = dataclasses.replace(TRL, offload_stash=2)
    offloading: dict[str, Any] = {"gradient_checkpointing": False, "activation_offloading": True}
    one, other = (of_stack(which, **offloading) for which in (TRL, stack))
    # Three hidden states in 16 bits fewer wait for their copies.
    changed = {"kept_bytes": (2 - 5) * TOKENS * one.model.hidden_size * 2}
    assert changed_moments(one, other) == {
        "output head, forward": changed,
        "forward of decoder layer 15": changed,
    }
    assert differences(live(one).resident, live(other).resident) == {}
    assert estimate_step(other, H100) == estimate_step(one, H100)


def test_another_adapter_dtype_changes_the_adapters_width_alone() -> None:
    stack = dataclasses.replace(TRL, adapter_dtype="float32")
    one, other = of_stack(TRL), of_stack(stack)
    assert one.adapter is not None
    assert other.adapter is not None
    assert differences(one.adapter, other.adapter) == {"width": 2}
    before, after = live(one).resident, live(other).resident
    assert set(differences(before, after)) == {"trained", "adapter_bytes"}
    assert after.adapter_bytes == 2 * before.adapter_bytes
    # Gradients are as wide, and a product casts what it multiplies.
    moments = changed_moments(one, other)
    assert set(moments) == {f"backward of decoder layer {index}" for index in (0, 15)}
    assert {part for moment in moments.values() for part in moment} == {"gradient_bytes", "workspace_bytes"}


@pytest.mark.parametrize("replay", [False, True], ids=["counted", "replayed"])
@pytest.mark.parametrize(
    ("change", "knobs"),
    [
        ({"offload_stash": 2}, {}),
        ({"adapter_dtype": "float32"}, {"method": "lora"}),
        ({"adapter_dtype": "float32"}, {"method": "full"}),
        ({"kept_attention": ()}, {}),
        ({"name": "made-up", "packages": ("torch",)}, {}),
    ],
)
def test_what_a_run_does_not_use_changes_nothing(
    change: dict[str, Any], knobs: dict[str, Any], replay: bool
) -> None:
    one, other = (of_stack(stack, **knobs) for stack in (TRL, dataclasses.replace(TRL, **change)))
    assert estimate_memory(other, gpu=H100, replay=replay) == estimate_memory(one, gpu=H100, replay=replay)
    assert estimate_step(other, H100) == estimate_step(one, H100)


def test_every_path_of_a_stack_reaches_the_replay() -> None:
    """What is remembered between replays of one setup is not another stack's."""
    offloading: dict[str, Any] = {"gradient_checkpointing": False, "activation_offloading": True}
    for change in ({"offload_stash": 2}, {"adapter_dtype": "float32"}):
        runs = [of_stack(stack, **offloading) for stack in (TRL, dataclasses.replace(TRL, **change))]
        first, second = (estimate_memory(run, gpu=H100, replay=True).allocated_bytes for run in runs)
        assert first != second, change
