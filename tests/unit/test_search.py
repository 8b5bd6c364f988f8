"""The search finds the fastest setup that fits, and keeps what must be kept."""

from __future__ import annotations

from typing import Any

import pytest

from planner.base.errors import InputError, NotModelledError
from planner.gpus.spec import GpuSpec
from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.search import COMPILED, EAGER, batches, fewest_layers, finish_seconds, modes, search
from planner.search.evaluator import Evaluator
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup

GIB = 2**30
TOKENS = 10_000_000


def evaluator_for(model: str, gpu: str, usable_bytes: int | None = None) -> Evaluator:
    target = resolve_gpu(gpu)
    return Evaluator(resolve_model(model), target.spec, usable_bytes or target.usable_bytes)


@pytest.mark.parametrize(
    ("model", "gpu", "length"),
    [("llama-3.1-8b", "24GB", 2048), ("qwen2.5-0.5b", "80GB", 512), ("qwen2.5-14b", "16GB", 1024)],
)
def test_the_choice_is_what_brute_force_finds(model: str, gpu: str, length: int) -> None:
    evaluator = evaluator_for(model, gpu)
    base = TrainingSetup(model=model, max_length=length)
    result = search(base, evaluator, effective_batch_size=16, fixed={}, tokens=TOKENS)
    times = []
    layers = evaluator.model.num_hidden_layers
    for compiled in ("none", "regional"):
        for kept in range(0, layers + 1, max(1, layers // 6)):
            for micro in (1, 2, 4, 8, 16):
                setup = base.replace(
                    compile=compiled,
                    gradient_checkpointing=kept > 0,
                    checkpointed_layers=kept if 0 < kept < layers else None,
                    per_device_train_batch_size=micro,
                    gradient_accumulation_steps=16 // micro,
                )
                candidate = evaluator.evaluate(setup)
                if evaluator.fits(candidate):
                    times.append(finish_seconds(candidate, TOKENS))
    assert result.chosen is not None
    assert len(times) >= 10
    chosen = finish_seconds(result.chosen.candidate, TOKENS)
    assert chosen is not None
    assert chosen <= 1.01 * min(seconds for seconds in times if seconds is not None)
    assert evaluator.fits(result.chosen.candidate)


def test_a_short_run_stays_uncompiled() -> None:
    evaluator = evaluator_for("qwen2.5-0.5b", "80GB")
    base = TrainingSetup(model="qwen2.5-0.5b", max_length=512)
    found = {}
    for tokens in (100_000, 1_000_000_000):
        chosen = search(base, evaluator, effective_batch_size=16, fixed={}, tokens=tokens).chosen
        assert chosen is not None
        found[tokens] = chosen.candidate.setup.compile
    assert found == {100_000: "none", 1_000_000_000: "regional"}


def test_memory_left_over_is_spent_on_fewer_checkpoints() -> None:
    """One layer less would not fit any more."""
    evaluator = evaluator_for("llama-3.1-8b", "16GB")
    base = TrainingSetup(model="llama-3.1-8b", max_length=4096)
    result = search(base, evaluator, effective_batch_size=16, fixed={}, confirm=True)
    assert result.chosen is not None
    setup = result.chosen.candidate.setup
    assert setup.checkpointed_layers is not None
    assert 0 < setup.checkpointed_layers < 32
    assert evaluator.fits(evaluator.confirm(setup))
    further = setup.replace(checkpointed_layers=setup.checkpointed_layers - 2)
    assert not evaluator.fits(evaluator.confirm(further))


def test_batches_of_many_lengths_are_not_compiled() -> None:
    target = resolve_gpu("24GB")
    padded = Evaluator(resolve_model("llama-3.1-8b"), target.spec, target.usable_bytes, padded=True)
    base = TrainingSetup(model="llama-3.1-8b", max_length=2048)
    assert modes(base, padded, {}) == (EAGER,)
    assert modes(base.replace(packing=True), padded, {}) == (EAGER, COMPILED)
    assert modes(base, evaluator_for("llama-3.1-8b", "24GB"), {}) == (EAGER, COMPILED)
    assert modes(base, evaluator_for("llama-3.1-8b", "24GB"), {"compile": "none"}) == (EAGER,)


def test_the_effective_batch_is_never_traded() -> None:
    for effective, processes in ((16, 1), (12, 1), (7, 1), (32, 2), (1, 1)):
        for batch in batches(effective, processes, {}):
            size = batch.per_device_train_batch_size * batch.gradient_accumulation_steps * processes
            assert size == effective
    assert [b.per_device_train_batch_size for b in batches(12, 1, {})] == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize(
    ("effective", "processes", "fixed"),
    [
        (16, 3, {}),
        (16, 1, {"per_device_train_batch_size": 3}),
        (16, 1, {"gradient_accumulation_steps": 5}),
        (16, 1, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    ],
)
def test_an_impossible_batch_is_refused(effective: int, processes: int, fixed: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        batches(effective, processes, fixed)


def test_a_fixed_knob_is_kept() -> None:
    fixed = {"per_device_train_batch_size": 4, "gradient_checkpointing": False}
    base = TrainingSetup(model="qwen2.5-0.5b", max_length=512, **fixed)  # type: ignore[arg-type]
    result = search(base, evaluator_for("qwen2.5-0.5b", "24GB"), effective_batch_size=16, fixed=fixed)
    assert {one.candidate.setup.per_device_train_batch_size for one in result.tried} == {4}
    assert not any(one.candidate.setup.gradient_checkpointing for one in result.tried)


def test_the_fused_optimizer_is_taken_where_updates_are_a_part_of_the_time() -> None:
    base = TrainingSetup(model="qwen2.5-0.5b", max_length=512, optim="adamw_8bit")
    fast, slow = (evaluator_for("qwen2.5-0.5b", gpu) for gpu in ("h100-80gb", "rtx-3060-12gb"))
    full = TrainingSetup(model="qwen2.5-0.5b", max_length=512, optim="adamw_8bit", method="full")
    lion = base.replace(optim="lion_8bit")
    for evaluator, start, effective, fixed, wanted in (
        (fast, base, 4, {}, "adamw_torch_fused"),
        (fast, base, 4, {"optim": "adamw_8bit"}, "adamw_8bit"),
        (fast, full, 4, {}, "adamw_8bit"),
        (fast, lion, 4, {}, "lion_8bit"),
        (slow, base, 256, {}, "adamw_8bit"),
    ):
        for confirm in (True, False):
            result = search(start, evaluator, effective_batch_size=effective, fixed=fixed, confirm=confirm)
            assert result.chosen is not None
            assert result.chosen in result.tried
            assert result.chosen.candidate.setup.optim == wanted
            assert result.chosen.strategy.endswith(wanted) == (wanted == "adamw_torch_fused")


def test_checkpointing_is_left_alone_when_a_knob_decides_it() -> None:
    fixed = {"checkpointed_layers": 4}
    base = TrainingSetup(model="qwen2.5-0.5b", max_length=512, checkpointed_layers=4)
    result = search(base, evaluator_for("qwen2.5-0.5b", "24GB"), effective_batch_size=16, fixed=fixed)
    assert {one.candidate.setup.checkpointed_layers for one in result.tried} == {4}


def test_nothing_fits_on_a_card_without_memory() -> None:
    evaluator = evaluator_for("llama-3.1-8b", "16GB", usable_bytes=GIB)
    base = TrainingSetup(model="llama-3.1-8b", max_length=512)
    result = search(base, evaluator, effective_batch_size=16, fixed={})
    assert result.chosen is None
    smallest = result.smallest.candidate
    assert smallest.peak_upper_bytes == min(one.candidate.peak_upper_bytes for one in result.tried)
    assert smallest.setup.per_device_train_batch_size == 1
    assert smallest.setup.gradient_checkpointing


def test_a_knob_that_is_not_modelled_is_refused_when_fixed_and_never_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from planner.memory import estimate_memory
    from planner.search import evaluator as candidate

    def refuse(run: TrainingRun, **kwargs: Any) -> Any:
        if run.setup.kernels != "none":
            raise NotModelledError("kernels", run.setup.kernels)
        return estimate_memory(run, **kwargs)

    monkeypatch.setattr(candidate, "estimate_memory", refuse)
    evaluator = evaluator_for("qwen2.5-0.5b", "24GB")
    base = TrainingSetup(model="qwen2.5-0.5b", max_length=512)
    assert search(base, evaluator, effective_batch_size=4, fixed={}).chosen is not None
    with pytest.raises(NotModelledError, match="kernels"):
        search(base.replace(kernels="liger"), evaluator, effective_batch_size=4, fixed={})


def test_without_forecasts_the_largest_batch_that_fits_is_taken() -> None:
    known = resolve_gpu("24GB").spec
    unknown = GpuSpec(
        id="unknown",
        name="Unknown",
        memory_bytes=known.memory_bytes,
        usable_bytes=known.usable_bytes,
        compute_capability=(9, 0),
        supports_bfloat16=True,
        bandwidth_bytes_per_second=None,
        matrix_flops_per_second=None,
    )
    evaluator = Evaluator(resolve_model("qwen2.5-0.5b"), unknown, unknown.usable_bytes)
    base = TrainingSetup(model="qwen2.5-0.5b", max_length=512)
    result = search(base, evaluator, effective_batch_size=4, fixed={})
    assert result.chosen is not None
    assert result.chosen.candidate.speed is None
    assert result.chosen.candidate.setup.per_device_train_batch_size == 4


@pytest.mark.parametrize("layers", [1, 2, 3, 32, 81])
def test_no_layer_more_than_needed_is_checkpointed(layers: int) -> None:
    for needed in range(1, layers + 1):
        assert fewest_layers(layers, lambda some, needed=needed: some >= needed) == needed  # type: ignore[misc]


def test_inputs_are_offloaded_where_nothing_else_fits() -> None:
    evaluator = evaluator_for("qwen2.5-14b", "12GB")
    base = TrainingSetup(model="qwen2.5-14b", max_length=2048, optim="adamw_8bit")
    chosen = search(base, evaluator, effective_batch_size=16, fixed={}, confirm=True).chosen
    assert chosen is not None
    assert chosen.candidate.setup.activation_offloading
    assert chosen.candidate.peak_upper_bytes <= evaluator.usable_bytes
    without = {"activation_offloading": False}
    assert search(base, evaluator, effective_batch_size=16, fixed=without, confirm=True).chosen is None
    # A search that starts from that choice on a card with room goes back to what is faster.
    roomy = evaluator_for("qwen2.5-14b", "24GB")
    again = search(chosen.candidate.setup, roomy, effective_batch_size=16, fixed={}, confirm=True).chosen
    assert again is not None
    assert not again.candidate.setup.activation_offloading


@pytest.mark.parametrize("wished", [True, False])
def test_offloading_that_is_asked_for_is_kept(wished: bool) -> None:
    evaluator = evaluator_for("llama-3.1-8b", "24GB")
    fixed = {"activation_offloading": wished}
    base = TrainingSetup(model="llama-3.1-8b", max_length=2048, **fixed)
    result = search(base, evaluator, effective_batch_size=16, fixed=fixed, confirm=True)
    assert result.chosen is not None
    assert {one.candidate.setup.activation_offloading for one in result.tried} == {wished}
