"""Memory outside torch's allocator: measured on Hopper, elsewhere by a card's processors."""

from __future__ import annotations

import dataclasses

import pytest

from planner.base.units import MIB
from planner.gpus.catalog import gpu_catalog
from planner.memory.estimate import estimate_memory
from planner.memory.measured.context import ContextMemory
from planner.memory.measured.files import coefficients_for
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

CATALOG = gpu_catalog()
SEEN = {
    "t4": (128, 135, 141),
    "rtx-3090": (256,),
    "rtx-4090": (416, 504, 520),
    "rtx-6000-ada": (426, 429),
    "l40s": (522,),
    "rtx-5090": (595, 619),
}
"""MiB outside the allocator that others published (planner/memory/measured/context.py has the sources)."""


def context(gpu: str) -> ContextMemory:
    return coefficients_for(gpu, EXPANDABLE).context_on(CATALOG.get(gpu))


@pytest.mark.parametrize("gpu", SEEN)
def test_no_card_was_seen_with_more_than_is_expected_of_it(gpu: str) -> None:
    expected = context(gpu).expected_bytes / MIB
    # Messages of torch round to 0.01 GiB, three of them in a figure.
    assert max(SEEN[gpu]) <= expected + 15
    assert expected < 1.5 * max(SEEN[gpu])


def test_hopper_keeps_what_was_measured() -> None:
    assert context("h100-80gb") == ContextMemory(808_255_488, 0)
    assert context("h200") == ContextMemory(808_255_488, 0)


@pytest.mark.parametrize("gpu", ["rtx-4060", "rtx-3060-12gb", "rtx-5060-ti-16gb", "t4"])
def test_small_cards_have_a_third_of_hoppers_at_most_and_all_of_it_is_within_half(gpu: str) -> None:
    expected, spread = context(gpu)
    assert expected < context("h100-80gb").expected_bytes / 3
    assert spread > 20 * MIB
    assert expected + spread < context("h100-80gb").expected_bytes / 2


def test_a_card_of_unknown_processors_has_what_was_measured() -> None:
    unlisted = dataclasses.replace(CATALOG.get("rtx-4070"), id="unlisted", sm_count=None)
    measured = coefficients_for(None, EXPANDABLE)
    whole = ContextMemory(measured.context_bytes, measured.context_spread_bytes)
    assert measured.context_on(unlisted) == measured.context_on(None) == whole
    newer = dataclasses.replace(CATALOG.get("rtx-4070"), compute_capability=(13, 0))
    assert measured.context_on(newer) == whole


def test_only_the_context_and_the_width_change_with_the_processors() -> None:
    setup = TrainingSetup(model="llama-3.2-1b", max_length=1024)
    run = TrainingRun(setup=setup, model=load_shipped(setup.model))
    big, small = (
        estimate_memory(run, gpu=dataclasses.replace(CATALOG.get("rtx-4090"), sm_count=count), replay=True)
        for count in (128, 24)
    )
    assert (big.allocated_bytes, big.reserved_bytes) == (small.allocated_bytes, small.reserved_bytes)
    sizes = [{part.name: part.size_bytes for part in one.components} for one in (big, small)]
    changed = {name for name in sizes[0] if sizes[0][name] != sizes[1][name]}
    assert changed == {"context"}
    assert big.process_bytes - small.process_bytes == sizes[0]["context"] - sizes[1]["context"] > 0
