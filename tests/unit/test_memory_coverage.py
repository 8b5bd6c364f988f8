"""What lies outside the records is named, and widens the interval by what held-out runs show."""

from __future__ import annotations

import dataclasses
import json

import pytest

from planner.base.errors import InputError
from planner.calibration.margins import (
    LEAST_OUTSIDE_FACTOR,
    Shortfall,
    held_out_things,
    margin_share,
    outside_factor,
)
from planner.gpus.catalog import gpu_catalog
from planner.memory import MemoryBreakdown, estimate_memory
from planner.memory.measured.coefficients import Coefficients
from planner.memory.measured.coverage import Coverage, coverage_of
from planner.memory.measured.files import coefficients_for
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

H100 = gpu_catalog().get("h100-80gb")
PLAIN = TrainingSetup(model="llama-3.1-8b", max_length=4096)


def estimated(setup: TrainingSetup, gpu: str = "h100-80gb", **options: object) -> MemoryBreakdown:
    return estimate_memory(
        TrainingRun(setup=setup, model=load_shipped(setup.model)),
        gpu=gpu_catalog().get(gpu),
        replay=True,
        allocator=EXPANDABLE,
        **options,
    )


def width(found: MemoryBreakdown) -> int:
    return found.process_upper_bytes - found.process_bytes


def without(knob: str, value: str) -> Coefficients:
    """The shipped calibration, as if no run had had that value."""
    shipped = coefficients_for("h100-80gb", EXPANDABLE)
    assert shipped.coverage is not None
    less = dataclasses.replace(shipped.coverage, values=shipped.coverage.values - {(knob, value)})
    return dataclasses.replace(shipped, coverage=less)


def test_a_setup_like_the_records_is_measured() -> None:
    found = estimated(PLAIN)
    assert found.basis.measured
    assert found.basis.notes == ()


@pytest.mark.parametrize(
    ("knob", "value", "changes"),
    [
        ("kernels", "liger", {"kernels": "liger"}),
        ("compile", "regional", {"compile": "regional"}),
        ("attn_implementation", "eager", {"attn_implementation": "eager"}),
        ("optim", "sgd", {"optim": "sgd"}),
        ("packing", "true", {"packing": True}),
        ("gradient_checkpointing", "some layers", {"checkpointed_layers": 8}),
        ("lora_dropout", "above 0", {"lora_dropout": 0.05}),
    ],
)
def test_what_no_run_had_is_named_and_widens(knob: str, value: str, changes: dict[str, object]) -> None:
    setup = PLAIN.replace(**changes)
    known, unknown = estimated(setup), estimated(setup, coefficients=without(knob, value))
    note = f"no run with {knob}={value} among the records"
    assert note not in known.basis.notes
    assert note in unknown.basis.notes
    assert not unknown.basis.measured
    assert unknown.process_bytes == known.process_bytes
    assert width(unknown) > 1.2 * width(known)


def test_a_layout_no_model_had_is_named() -> None:
    found = estimated(
        PLAIN.replace(model="qwen3-8b", max_length=1024), coefficients=without("qk_norm", "head")
    )
    assert "no run of a model with qk_norm=head among the records" in found.basis.notes


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"max_length": 65536}, "length 65,536 beyond the largest measured, "),
        ({"max_length": 16384, "per_device_train_batch_size": 8}, "tokens of a micro-step 131,072 beyond"),
        ({"lora_r": 512}, "rank 512 beyond the largest measured, 256"),
    ],
)
def test_sizes_beyond_the_records_are_named_and_widen(changes: dict[str, object], note: str) -> None:
    found = estimated(PLAIN.replace(**changes))
    assert any(one.startswith(note) for one in found.basis.notes), found.basis.notes
    assert not found.basis.measured
    assert any(one.startswith("interval ") for one in found.basis.notes)


def test_two_knobs_never_measured_together_are_named() -> None:
    found = estimated(PLAIN.replace(packing=True, use_dora=True))
    assert "no run with packing=true and use_dora=true together among the records" in found.basis.notes
    seen = estimated(PLAIN.replace(activation_offloading=True, gradient_checkpointing=False))
    assert seen.basis.measured


def test_each_thing_outside_widens_further() -> None:
    once = estimated(PLAIN.replace(max_length=65536))
    twice = estimated(PLAIN.replace(max_length=65536, lora_r=512))
    share = [width(found) / width(estimated(PLAIN)) for found in (once, twice)]
    assert share[0] < share[1]


def test_a_model_that_no_run_had_is_named_but_not_widened() -> None:
    """The ordinary interval is learned from models that were held out."""
    shipped = coefficients_for("h100-80gb", EXPANDABLE)
    rest = tuple(one for one in shipped.model_ids if one != "llama-3.1-8b")
    found = estimated(PLAIN, coefficients=dataclasses.replace(shipped, model_ids=rest))
    assert found.basis.notes == ("no run of this model among the records",)
    assert not found.basis.measured
    assert width(found) == width(estimated(PLAIN))


def test_another_gpu_widens_by_the_contexts_spread() -> None:
    """And by what of the context may not go with its processors."""
    here, there = estimated(PLAIN), estimated(PLAIN, gpu="a100-80gb")
    assert there.basis.notes == ("context measured on h100-80gb, not on this GPU",)
    spread = coefficients_for("h100-80gb", EXPANDABLE).context_spread_bytes
    assert width(there) - width(here) > spread > 0
    # As many threads as an H100, by the SXM's own processors: nothing more to be unsure of.
    assert width(estimated(PLAIN, gpu="h100-nvl-94gb")) - width(here) == spread


def test_a_calibration_without_coverage_says_so() -> None:
    bare = dataclasses.replace(coefficients_for("h100-80gb", EXPANDABLE), coverage=None)
    found = estimated(PLAIN, coefficients=bare)
    assert "the calibration does not say what its records cover" in found.basis.notes
    assert width(found) > width(estimated(PLAIN))


def test_coverage_round_trips_and_is_checked() -> None:
    model = load_shipped(PLAIN.model)
    run = TrainingRun(setup=PLAIN.replace(packing=True, use_dora=True), model=model, padded=True)
    found = coverage_of([run])
    assert Coverage.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.outside(run) == ()
    assert found.outside(TrainingRun(setup=PLAIN, model=model)) == ()
    wrong: tuple[dict[str, object], ...] = (
        {},
        {"values": {}},
        {**found.to_dict(), "pairs": [1]},
        {**found.to_dict(), "max_rank": "x"},
    )
    for broken in wrong:
        with pytest.raises(InputError, match="not a coverage"):
            Coverage.from_dict(broken)


def shortfall(beyond: int, kind: str = "checkpointed", thing: str = "a") -> Shortfall:
    return Shortfall(
        beyond_bytes=beyond,
        scale_bytes=100,
        kind=kind,
        things=frozenset({("knob", thing)}),
        sizes=(1, 1, 1, 1),
    )


def test_a_margin_covers_the_worst_held_out_run_of_its_kind() -> None:
    runs = [shortfall(beyond) for beyond in (-50, 10, 60)] + [
        shortfall(beyond, kind="full") for beyond in (0, 0, 110)
    ]
    share = margin_share(runs, kind="checkpointed", constant_bytes=10, slack=0.1)
    assert share == pytest.approx(0.6)
    assert margin_share(runs, kind="full", constant_bytes=10, slack=0.1) == pytest.approx(1.1)
    # Too few of a kind to learn from: the worst of all.
    assert margin_share(runs, kind="kept", constant_bytes=10, slack=0.1) == pytest.approx(1.1)


def test_the_factor_is_what_a_held_out_thing_needed_of_the_others_interval() -> None:
    runs = [shortfall(10) for _ in range(4)] + [shortfall(44, thing="b")]
    things = held_out_things(runs, constant_bytes=0, slack={"checkpointed": 0.1})
    assert things[0].thing == "knob=b"
    assert things[0].ratio == pytest.approx(44 / 20)
    assert outside_factor(things) == pytest.approx(2.2)
    assert outside_factor(()) == LEAST_OUTSIDE_FACTOR
