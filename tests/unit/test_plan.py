"""What a plan promises: defaults, verdicts, advice that holds, and JSON that comes back whole."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from planner.answers.plan import Plan
from planner.base.errors import FieldError, InputError
from planner.gpus.target import resolve_gpu
from planner.memory import estimate_memory
from planner.models.catalog import resolve_model
from planner.planning.estimation import Estimator
from planner.planning.make_plan import make_plan
from planner.search.cards import cards_by_memory
from planner.search.frontier import runners_up
from planner.setup import defaults
from planner.setup.cuda_allocator import EXPANDABLE, NATIVE, VARIABLE
from planner.setup.request import PlanRequest, make_request
from planner.setup.run import TrainingRun
from planner.text.choice import print_runners_up

Cli = Callable[..., Any]
GIB = 2**30


def plan_for(model: str, gpu: str, *, whole: bool = False, **wishes: object) -> Plan:
    return make_plan(make_request(model, gpu=gpu, **wishes), whole=whole)  # type: ignore[arg-type]


@functools.cache
def whole_plan(model: str, gpu: str) -> Plan:
    """With all that is said of other methods, ranks and cards, which takes a search each."""
    return plan_for(model, gpu, whole=True)


REQUESTS = {
    "fits": make_request("qwen2.5-14b", gpu="16GB"),
    "does not fit": make_request("llama-3.1-70b", gpu="24GB"),
    "full": make_request("smollm2-135m", gpu="12GB", knobs={"method": "full", "optim": "adamw_torch"}),
    "knobs": make_request(
        "llama-3.2-1b",
        gpu="rtx-4090",
        knobs={"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05, "use_rslora": True},
        effective_batch_size=8,
        num_train_epochs=2,
        learning_rate=1e-4,
        price_usd_per_hour=0.5,
        display=True,
    ),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
def test_json_comes_back_whole(request_: PlanRequest) -> None:
    plan = make_plan(request_)
    text = json.dumps(plan.to_dict(), allow_nan=False)
    assert Plan.from_dict(json.loads(text)) == plan
    assert json.loads(text)["version"] == 1


def test_json_of_another_version_or_shape_is_refused() -> None:
    values = plan_for("qwen2.5-0.5b", "16GB").to_dict()
    with pytest.raises(FieldError, match="version"):
        Plan.from_dict({**values, "version": 2})
    with pytest.raises(FieldError, match="key"):
        Plan.from_dict({**values, "colour": "red"})
    with pytest.raises(InputError, match="missing"):
        Plan.from_dict({k: v for k, v in values.items() if k != "memory"})
    with pytest.raises(FieldError, match="fits"):
        Plan.from_dict({**values, "fits": 1})
    with pytest.raises(InputError):
        Plan.from_dict([])  # type: ignore[arg-type]


def test_the_bar_of_14b_on_16gb() -> None:
    assert plan_for("qwen2.5-14b", "16GB").fits
    eager = {"compile": "none", "gradient_checkpointing": True}
    plan = plan_for("qwen2.5-14b", "16GB", knobs=eager)
    assert plan.fits
    setup = plan.setup
    assert (setup.method, setup.lora_r, setup.alpha, setup.max_length) == ("qlora", 16, 32, 4096)
    assert setup.effective_batch_size == 16
    assert setup.optim == "adamw_8bit"
    assert setup.dtype == "bfloat16"
    assert plan.memory.weights_bytes == pytest.approx(9.250 * GIB, rel=0.0005)
    assert plan.memory.allocated_bytes == pytest.approx(12.52 * GIB, rel=0.04)
    assert any("rtx-5060-ti-16gb" in text for text in plan.assumptions)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (None, "torch's expandable segments, which the launcher sets: PYTORCH_CUDA_ALLOC_CONF="),
        ("max_split_size_mb:64", "torch's default allocator"),
    ],
)
def test_a_plan_is_for_the_allocator_that_its_run_gets_and_says_which(
    setting: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planner.setup.cuda_allocator.machine_allocator", lambda: EXPANDABLE)
    if setting is not None:
        monkeypatch.setenv(VARIABLE, setting)
    plan = plan_for("qwen2.5-14b", "16GB", knobs={"compile": "none"})
    (text,) = [text for text in plan.assumptions if "memory with torch's" in text]
    assert said in text
    allocator = EXPANDABLE if setting is None else NATIVE
    model = resolve_model("qwen2.5-14b")
    again = estimate_memory(
        TrainingRun(setup=plan.setup, model=model), gpu=plan.gpu.spec, replay=True, allocator=allocator
    )
    assert plan.memory.process_bytes == again.process_bytes


def test_70b_on_24gb_names_the_smallest_card_that_takes_it() -> None:
    plan = plan_for("llama-3.1-70b", "24GB")
    assert not plan.fits
    assert plan.headroom_bytes < 0
    card = plan.smallest_gpu
    assert card is not None
    there = plan_for("llama-3.1-70b", card.gpu)
    assert there.fits
    assert there.setup.max_length == card.max_length
    # Of cards of one size, which differ by tens of MiB, the one that most people have is named.
    sizes = {gpu.memory_bytes: gpu for gpu in reversed(cards_by_memory())}
    for smaller in sizes.values():
        if 0.5 * card.usable_bytes < smaller.usable_bytes < 0.97 * card.usable_bytes:
            assert not plan_for("llama-3.1-70b", smaller.id).fits


def test_the_smallest_card_is_one_for_a_desktop_and_one_to_rent() -> None:
    """Seen the other way: a person with a GeForce was told of a T4."""
    plan = plan_for("qwen2.5-14b", "8GB")
    assert not plan.fits
    assert [(card.kind, card.gpu) for card in plan.smallest_cards] == [
        ("desktop", "rtx-3060-12gb"),
        ("rented", "t4"),
    ]
    assert plan.smallest_gpu == plan.smallest_cards[0]


def test_a_card_that_cannot_run_a_fixed_knob_is_not_named() -> None:
    plan = plan_for("qwen2.5-14b", "8GB", knobs={"attn_implementation": "flash_attention_2"})
    assert [card.gpu for card in plan.smallest_cards] == ["rtx-3060-12gb", "l4"]


def test_the_smallest_card_takes_it_beside_a_display() -> None:
    plan = plan_for("qwen2.5-14b", "8GB", display=True)
    for card in plan.smallest_cards:
        there = plan_for("qwen2.5-14b", card.gpu, display=True)
        assert there.fits
        assert (there.gpu.usable_bytes, there.setup.max_length) == (card.usable_bytes, card.max_length)


def test_without_data_the_longest_default_that_fits_is_taken() -> None:
    wanted = {"24GB": 4096, "16GB": 4096}
    for gpu, length in wanted.items():
        assert plan_for("qwen2.5-7b", gpu).setup.max_length == length
    tight = plan_for("qwen3-14b", "12GB")
    lengths = list(defaults.DEFAULT_LENGTHS)
    assert tight.setup.max_length in lengths[1:]
    longer = lengths[lengths.index(tight.setup.max_length) - 1]
    assert not plan_for("qwen3-14b", "12GB", knobs={"max_length": longer}).fits


def test_a_length_beyond_the_model_is_not_chosen() -> None:
    assert plan_for("tinyllama-1.1b", "24GB").setup.max_length == 2048


def test_float16_where_bfloat16_is_emulated() -> None:
    plan = plan_for("llama-3.2-1b", "t4")
    assert plan.setup.dtype == "float16"
    assert any("float16" in text for text in plan.assumptions)


@pytest.mark.parametrize(
    ("model", "method", "rate"),
    [
        ("llama-3.1-8b", "qlora", 2e-4),
        ("qwen2.5-14b", "qlora", 1e-4),
        ("qwen2.5-14b", "lora", 1e-4),
        ("llama-3.1-8b", "full", 2e-5),
        ("qwen2.5-32b", "full", 1e-5),
    ],
)
def test_learning_rate_by_method_and_size(model: str, method: str, rate: float) -> None:
    assert defaults.learning_rate(method, resolve_model(model)) == pytest.approx(rate)


def test_what_was_fixed_is_kept_and_not_listed_as_assumed() -> None:
    knobs = {"max_length": 1024, "lora_r": 8, "gradient_checkpointing": False}
    plan = plan_for("qwen2.5-0.5b", "24GB", knobs=knobs, effective_batch_size=4, learning_rate=3e-4)
    assert (plan.setup.max_length, plan.setup.lora_r) == (1024, 8)
    assert not plan.setup.gradient_checkpointing
    assert plan.setup.effective_batch_size == 4
    assert plan.schedule.learning_rate == 3e-4
    text = " ".join(plan.assumptions)
    for word in ("length 1,024", "rank", "effective batch", "learning rate"):
        assert word not in text


def test_a_fixed_batch_bends_only_an_effective_batch_that_nobody_asked_for() -> None:
    plan = plan_for("qwen2.5-0.5b", "24GB", knobs={"per_device_train_batch_size": 3})
    assert plan.setup.effective_batch_size == 15
    assert any("15" in text for text in plan.assumptions)


def test_a_display_takes_memory() -> None:
    bare, shown = plan_for("qwen2.5-0.5b", "16GB"), plan_for("qwen2.5-0.5b", "16GB", display=True)
    assert bare.gpu.usable_bytes - shown.gpu.usable_bytes == shown.gpu.held_bytes > GIB


def test_the_plan_and_estimate_agree() -> None:
    plan = plan_for("llama-3.1-8b", "24GB")
    figures = Estimator(resolve_gpu("24GB")).estimate(plan.setup)
    assert figures.memory == plan.memory
    assert figures.speed == plan.speed
    assert figures.fits == plan.fits


TOO_LONG: dict[str, Any] = {"max_length": 8192, "optim": "adamw_torch", "lora_r": 64}


def test_advice_to_make_it_fit_puts_what_works_first() -> None:
    plan = plan_for("llama-3.1-8b", "10GB", knobs=TOO_LONG, whole=True)
    assert not plan.fits
    own = [advice for advice in plan.advice if "--model" not in advice.flags]
    assert own
    assert [advice.fits for advice in own] == sorted((a.fits for a in own), reverse=True)
    assert all(advice.change_bytes < 0 for advice in own)
    smaller = [advice for advice in plan.advice if "--model" in advice.flags]
    assert [advice.flags for advice in smaller] != ["--model llama-3.1-8b"]


def test_a_length_that_does_not_fit_is_answered_by_the_longest_that_does() -> None:
    """Seen the other way: half of it was advised, or a default length, whatever fitted."""
    plan = plan_for("llama-3.1-8b", "8GB", knobs={"max_length": 16384})
    assert not plan.fits
    (row,) = [one for one in plan.advice if one.flags.startswith("--max-length")]
    longest = int(row.flags.split()[1])
    assert row.fits
    assert row.title == f"length {longest:,} instead of 16,384"
    assert not plan_for("llama-3.1-8b", "8GB", knobs={"max_length": longest + 512}).fits


def test_the_short_page_has_the_first_of_the_advice_that_fits() -> None:
    asked = make_request("llama-3.1-8b", gpu="10GB", knobs=TOO_LONG)
    plan, page = make_plan(asked), make_plan(asked, whole=False)
    fitting = [one for one in plan.advice if one.fits]
    assert fitting
    assert list(page.advice) == fitting[:3]
    assert page.smallest_cards == plan.smallest_cards


def test_what_is_left_is_offered_only_where_it_fits() -> None:
    plan = whole_plan("llama-3.1-8b", "24GB")
    assert plan.fits
    assert {"--lora-r 64"} <= {advice.flags for advice in plan.advice}
    assert all(advice.peak_upper_bytes <= plan.gpu.usable_bytes for advice in plan.advice)


def test_a_row_says_what_else_changes(cli: Cli) -> None:
    """Seen the other way: a higher rank was said to be slower, and not that it checkpoints and offloads."""
    plan = whole_plan("qwen2.5-14b", "16GB")
    (row,) = [one for one in plan.advice if one.title == "rank 64"]
    there = plan_for("qwen2.5-14b", "16GB", knobs={"lora_r": 64})
    assert not plan.setup.activation_offloading
    assert there.setup.activation_offloading
    assert "offloading on" in row.changes
    assert row.faster is not None
    text = " ".join(cli("plan", "qwen2.5-14b", "16GB", "--full").out.split())
    assert f"--lora-r 64 {', '.join(row.changes)}, {-row.faster:.0%} slower" in text


def test_how_it_runs_is_left_to_the_plan_where_that_is_faster() -> None:
    eager = {"compile": "none", "gradient_checkpointing": True, "per_device_train_batch_size": 1}
    plan = plan_for("llama-3.2-3b", "24GB", knobs=eager, whole=True)
    row = plan.advice[0]
    assert row.without == ("--per-device-train-batch-size", "--gradient-checkpointing", "--compile")
    free = plan_for("llama-3.2-3b", "24GB")
    assert (row.setup, row.peak_upper_bytes) == (free.setup, free.memory.peak_upper_bytes)
    assert "compile regional" in row.changes
    assert [one.without for one in whole_plan("llama-3.2-3b", "24GB").advice if one.without] == []


def test_methods_are_as_a_plan_for_each_has_them() -> None:
    plan = whole_plan("llama-3.1-8b", "24GB")
    methods = {one.method: one for one in plan.methods}
    assert set(methods) == {"qlora", "lora", "full"}
    assert methods["qlora"].peak_upper_bytes == plan.memory.peak_upper_bytes
    assert methods["lora"].fits
    assert methods["lora"].weights_bytes > methods["qlora"].weights_bytes
    assert not methods["full"].fits
    assert plan.gpu.usable_bytes < methods["full"].peak_upper_bytes
    assert (methods["lora"].desktop_card, methods["lora"].rented_card) == ("rtx-3090", "l4")


def test_experts_and_embeddings_are_told() -> None:
    notes = " ".join(note.text for note in plan_for("qwen3-30b-a3b", "80GB").notes)
    assert "experts" in notes
    assert "embeddings" in notes
    assert "experts" not in " ".join(note.text for note in plan_for("qwen2.5-7b", "80GB").notes)
    assert any("paged" in note.text for note in plan_for("llama-3.1-70b", "24GB").notes)


def test_alternatives_say_why_they_lost() -> None:
    reasons = set()
    for model, card in (
        ("qwen2.5-14b", "16GB"),
        ("gemma-3-12b", "12GB"),
        ("qwen2.5-7b", "12GB"),
    ):
        plan = whole_plan(model, card)
        rate = plan.speed.tokens_per_second if plan.speed else 0.0
        for one in plan.alternatives:
            reasons.add(one.lost)
            assert one.fits == (one.lost != "too large")
            if one.lost == "too large":
                assert one.amount == one.peak_upper_bytes - plan.gpu.usable_bytes > 0
            elif one.lost == "tie":
                assert one.amount == one.peak_upper_bytes - plan.memory.peak_upper_bytes > 0
            elif one.lost == "offloads":
                assert "offloaded" in one.strategy
                assert "offloaded" not in plan.strategy
                assert one.tokens_per_second == pytest.approx(rate, rel=0.02)
            else:
                assert 0 < one.amount < 1
    assert reasons == {"too large", "slower", "tie", "offloads"}


@pytest.mark.parametrize(
    ("model", "lost", "told"),
    [
        ("gemma-3-12b", "offloads", "as fast, but offloads"),
        ("qwen2.5-7b", "tie", "as fast, but larger"),
        ("qwen2.5-7b", "slower", "% slower"),
    ],
)
def test_the_reason_why_a_setup_lost_is_told(model: str, lost: str, told: str) -> None:
    plan = whole_plan(model, "12GB")
    others = tuple(one for one in plan.alternatives if one.lost == lost)
    assert others
    out = Console(file=io.StringIO(), width=100)
    print_runners_up(out, dataclasses.replace(plan, runners_up=runners_up(others, (), plan.gpu.usable_bytes)))
    assert told in out.file.getvalue()  # type: ignore[attr-defined]


def test_data_decides_length_time_and_steps(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [json.dumps({"text": "word " * (100 + i)}) for i in range(995)]
    rows += [json.dumps({"text": "word " * 30_000})] * 5
    data.write_text("\n".join(rows))
    plan = plan_for(
        "qwen2.5-0.5b",
        "24GB",
        data=str(data),
        num_train_epochs=2,
        price_usd_per_hour=2.0,
        knobs={"packing": False},
    )
    assert plan.data is not None
    assert plan.data.examples == 1000
    assert plan.data.covered_percent >= 99.0
    assert plan.setup.max_length < 4096
    assert plan.data.truncated_examples == 5
    assert plan.data.truncated_tokens > 100_000
    assert plan.data.estimated
    assert plan.duration is not None
    assert plan.duration.steps == 2 * 63
    assert plan.duration.usd == pytest.approx(2.0 * plan.duration.hours)
    assert plan.duration.hours_low < plan.duration.hours < plan.duration.hours_high


def test_no_rate_is_above_the_roofline() -> None:
    for model, gpu in (("llama-3.1-8b", "24GB"), ("qwen2.5-14b", "16GB"), ("qwen2.5-0.5b", "t4")):
        speed = plan_for(model, gpu).speed
        assert speed is not None
        assert speed.tokens_per_second <= speed.roofline_tokens_per_second
        assert not speed.calibrated


def test_two_cards_are_planned() -> None:
    plan = plan_for("llama-3.1-8b", "2x24GB")
    assert plan.gpu.count == 2
    assert plan.setup.num_processes == 2
    assert any("chosen among one GPU, DDP and FSDP2" in text for text in plan.assumptions)
    assert plan.setup.effective_batch_size == 16


def test_a_request_without_its_own_gpu_asks_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.gpus.detect import LocalGpu

    spec = resolve_gpu("24GB").spec
    free = LocalGpu(
        index=1,
        uuid="GPU-1",
        spec=spec,
        in_catalog=True,
        used_bytes=2 * GIB,
        processes=(),
        display_active=False,
    )
    busy = LocalGpu(
        index=0,
        uuid="GPU-0",
        spec=spec,
        in_catalog=True,
        used_bytes=20 * GIB,
        processes=(),
        display_active=True,
    )
    monkeypatch.setattr("planner.gpus.detect.local_gpus", lambda: (busy, free))
    plan = make_plan(make_request("llama-3.1-8b"))
    assert (plan.gpu.index, plan.gpu.position) == (1, 1)
    assert plan.gpu.usable_bytes == spec.usable_bytes - 2 * GIB
    assert plan.gpu.held_bytes == 2 * GIB


def test_offloaded_activations_need_host_memory() -> None:
    """A layer's input each, in pinned blocks of a power of two: 48 x 84 MB become 48 x 128 MiB."""
    knobs = {"max_length": 4096, "per_device_train_batch_size": 2}
    with_it, without = (
        plan_for("qwen2.5-14b", "24GB", knobs={**knobs, "activation_offloading": wished})
        for wished in (True, False)
    )
    assert with_it.setup.activation_offloading
    assert with_it.loading.host_memory_bytes == 3_000_000_000 + 48 * 128 * 2**20
    assert without.loading.host_memory_bytes < with_it.loading.host_memory_bytes
