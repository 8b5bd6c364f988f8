"""A mixture's experts in 4 bits: what a plan takes, what a setup without the knob means, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from planner.answers.plan import Plan
from planner.base.data_files import PROFILES
from planner.base.errors import FieldError, InputError, NotModelledError
from planner.memory.estimate import estimate_memory
from planner.memory.held.weights import loaded_weights
from planner.models.catalog import load_shipped, resolve_model
from planner.models.storage import expert_slices
from planner.planning.comparison import smallest_cards
from planner.planning.make_plan import make_plan
from planner.setup.cuda_allocator import EXPANDABLE
from planner.setup.request import make_request
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.text.short import print_short
from planner.throughput.traffic import weight_bytes

MIXTURE = "qwen3-30b-a3b"
IN_SLICES = {"experts": "4bit", "experts_matmul": "sliced"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def plan_of(gpu: str = "24GB", model: str = MIXTURE, **knobs: Any) -> Plan:
    return make_plan(make_request(model, gpu=gpu, knobs=knobs), whole=False)


def run_of(model: str = MIXTURE, **knobs: Any) -> TrainingRun:
    setup = TrainingSetup(**{"model": model, "max_length": 512, **knobs})
    return TrainingRun(setup=setup, model=load_shipped(model))


def test_a_mixture_of_30_billion_fits_on_24_gb_at_the_highest_rank_that_does() -> None:
    plan = plan_of(max_length=2048)
    assert plan.fits
    assert (plan.setup.experts, plan.setup.lora_r, plan.setup.target_modules) == ("4bit", 8, "all-linear")
    assert any("rank 8" in line and "do not fit" in line for line in plan.assumptions)
    page = io.StringIO()
    print_short(Console(file=page, width=80), plan)
    assert "rank 8, alpha 16, all linear layers (rank 16 does not fit)" in page.getvalue()
    assert not plan_of(max_length=2048, lora_r=16).fits
    on_attention = plan_of(max_length=2048, target_modules=ATTENTION)
    assert on_attention.fits
    assert on_attention.setup.lora_r == 16


def test_what_other_commands_say_of_cards_and_lengths_is_what_a_plan_answers() -> None:
    base = TrainingSetup(model=MIXTURE, max_length=512, gradient_accumulation_steps=16)
    model = load_shipped(MIXTURE)
    cards = smallest_cards(base, model, ("qlora",), fixed={}, given_length=2048)
    assert cards[0].gpu is not None
    assert plan_of(cards[0].gpu, max_length=2048).fits
    assert cards[0].desktop_card == "rtx-3090"


def test_experts_in_16_bits_are_a_matter_of_asking() -> None:
    assert plan_of("80GB").setup.experts == "4bit"
    assert plan_of("80GB", experts="16bit").setup.experts == "16bit"


@pytest.mark.parametrize("knobs", [{"method": "lora"}, {"prepare_for_kbit_training": True}])
def test_a_plan_takes_16_bits_where_4_do_not_work(knobs: dict[str, Any]) -> None:
    assert plan_of("b200", max_length=512, **knobs).setup.experts == "16bit"


def test_a_model_without_experts_is_planned_as_ever() -> None:
    assert plan_of(model="llama-3.1-8b").setup.experts == "16bit"


def test_a_setup_without_the_knob_has_experts_in_16_bits() -> None:
    """Every setup and record that was made before it."""
    setup = TrainingSetup.from_dict({"model": MIXTURE, "max_length": 512})
    assert setup.experts == "16bit"
    assert not TrainingRun(setup=setup, model=load_shipped(MIXTURE)).storage.experts


def test_experts_in_4_bits_are_what_bitsandbytes_makes_of_that_many_weights() -> None:
    model = load_shipped(MIXTURE)
    wide, held = (
        loaded_weights(model, run_of(experts=experts).storage, EXPANDABLE).memory
        for experts in ("16bit", "4bit")
    )
    experts = 48 * 128 * 3 * 2048 * 768
    assert wide.unquantized_bytes - held.unquantized_bytes == 2 * experts
    assert held.quantized_bytes - wide.quantized_bytes == experts // 2
    assert held.constants_bytes - wide.constants_bytes == pytest.approx(
        experts / 64 * (1 + 4 / 256), rel=0.001
    )


def test_a_checkpointed_layer_dequantises_its_experts_twice_and_others_once() -> None:
    experts = 48 * 128 * 3 * 2048 * 768
    for kept, times in ((True, 2), (False, 1)):
        wide, held, sliced = (
            weight_bytes(run_of(gradient_checkpointing=kept, target_modules=ATTENTION, **each))
            for each in ({"experts": "16bit"}, {"experts": "4bit"}, IN_SLICES)
        )
        assert (held - wide) / experts == pytest.approx(2.7 * times)
        # Backward's products dequantise for themselves.
        assert (sliced - held) / experts == pytest.approx(2.7)


def test_experts_in_slices_are_never_whole_and_not_kept_for_backward() -> None:
    """Of Qwen3-30B-A3B a layer's are 1.1 GiB, which 12 layers that are not checkpointed keep otherwise."""
    layer = 128 * 3 * 2048 * 768 * 2
    for knobs, spared in (({}, 1), ({"checkpointed_layers": 36}, 12)):
        whole, sliced = (
            estimate_memory(run_of(target_modules=ATTENTION, **each, **knobs), gpu=None)
            for each in ({"experts": "4bit"}, IN_SLICES)
        )
        saved = whole.allocated_bytes - sliced.allocated_bytes
        assert 0.8 * spared * layer < saved < 1.1 * spared * layer, (saved, layer)
    assert expert_slices(128, 2 * 2048 * 768, 2) == (10,) * 12 + (8,)
    assert expert_slices(4, 16, 2) == (4,), "no quantisation constant begins with an expert"


def test_gpt_oss_fits_on_16_gb_by_flex_attention_and_longer_with_experts_in_slices() -> None:
    """Whole experts are taken while something fits with them, and a person's choice is never undone."""
    found = plan_of("16GB", "gpt-oss-20b", max_length=2048)
    assert found.fits
    assert (found.setup.attn_implementation, found.setup.experts_matmul) == ("flex_attention", "whole")
    longer = plan_of("16GB", "gpt-oss-20b", max_length=4096)
    assert longer.fits
    assert longer.setup.experts_matmul == "sliced"
    assert not plan_of("16GB", "gpt-oss-20b", max_length=4096, experts_matmul="whole").fits


def test_gpt_oss_as_it_is_published_in_mxfp4_is_the_model_of_the_catalog(tmp_path: Path) -> None:
    config = json.loads((PROFILES / "configs" / "gpt-oss-20b.json").read_text())
    stored = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    found, shipped = resolve_model(str(tmp_path)), load_shipped("gpt-oss-20b")
    assert (found.id, found.checkpoint, found.parameters) == (shipped.id, None, shipped.parameters)


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"method": "lora"}, "experts applies to qlora, but method is lora"),
        ({"experts": "16bit", "experts_matmul": "sliced"}, "experts_matmul sliced needs experts 4bit"),
        ({"prepare_for_kbit_training": True}, "experts 4bit needs prepare_for_kbit_training false"),
        ({"kernels": "liger"}, "experts 4bit needs kernels none"),
        ({"distributed": "fsdp", "num_processes": 2}, "experts 4bit needs one GPU or distributed ddp"),
    ],
)
def test_what_experts_in_4_bits_cannot_be_with_is_told(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        run_of(**{"experts": "4bit", **knobs})


@pytest.mark.parametrize(
    ("model", "knobs", "error", "told"),
    [
        ("llama-3.1-8b", {"experts": "4bit"}, FieldError, "experts.*no experts"),
        (
            MIXTURE,
            {"experts": "4bit", "gradient_checkpointing": False, "activation_offloading": True},
            NotModelledError,
            "experts=4bit",
        ),
        (MIXTURE, IN_SLICES, InputError, "experts_matmul sliced does not work with adapters on experts"),
        (MIXTURE, {"use_dora": True}, InputError, "use_dora true does not work with adapters on experts"),
    ],
)
def test_what_has_no_figures_is_refused_by_name(
    model: str, knobs: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        estimate_memory(run_of(model, **knobs), gpu=None)


@pytest.mark.parametrize("knobs", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_attention_of_a_mixture_takes_what_its_experts_do_not(knobs: dict[str, Any]) -> None:
    estimate_memory(run_of(target_modules=ATTENTION, **knobs), gpu=None)


def test_dropout_on_experts_is_estimated_and_not_planned() -> None:
    """Of what others ask about there is a figure; what cannot be trained is no plan."""
    estimate_memory(run_of(lora_dropout=0.1), gpu=None)
    with pytest.raises(InputError, match=r"lora_dropout 0\.1 does not work with adapters on experts"):
        make_plan(make_request(MIXTURE, gpu="80GB", knobs={"lora_dropout": 0.1}), whole=False)
