"""Setups as a person types and tells them: what advice says to type is what the command line reads."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from planner.commands.knobs import add_knobs, given_knobs
from planner.commands.program import Parser
from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.planning.asked import Asked
from planner.planning.savings import left_to_the_plan, savings, together
from planner.setup.options import differences, options
from planner.setup.request import make_request
from planner.setup.training_setup import TrainingSetup

WASTEFUL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "dtype": "float32",
    "attn_implementation": "eager",
    "optim": "adamw_torch",
}
REQUESTS = {
    "qlora": {**WASTEFUL, "bnb_4bit_use_double_quant": False, "prepare_for_kbit_training": True},
    "lora": {**WASTEFUL, "method": "lora", "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05},
    "dora": {"use_dora": True, "checkpointed_layers": 3},
    "full": {**WASTEFUL, "method": "full", "gradient_checkpointing": False},
    "budget": {"compile": "regional", "gradient_checkpointing": False, "activation_memory_budget": 0.5},
}


@pytest.mark.parametrize("knobs", REQUESTS.values(), ids=REQUESTS)
def test_what_a_change_says_to_type_and_to_leave_out_is_the_changed_request(knobs: dict[str, Any]) -> None:
    request = make_request("qwen2.5-0.5b", gpu="24GB", knobs={"max_length": 4096, **knobs})
    asked = Asked(request, resolve_gpu("24GB"), resolve_model("qwen2.5-0.5b"))
    parser = Parser()
    add_knobs(parser)
    parser.add_argument("--effective-batch-size", type=int)
    single = [one for kind in savings(asked, asked.base) for one in kind]
    free = left_to_the_plan(asked)
    changes = [*single, together(single), *([] if free is None else [free])]
    assert single
    for change in changes:
        args = parser.parse_args(shlex.split(change.flags))
        left_out = {name[2:].removeprefix("no-").replace("-", "_") for name in change.left_out(request)}
        fixed = {name: value for name, value in request.fixed.items() if name not in left_out}
        changed = change.of(request)
        assert changed.fixed == {**fixed, **dict(given_knobs(args))}, change.title
        assert changed.effective_batch_size == args.effective_batch_size
        assert changed != request, change.title


def test_how_it_runs_is_left_to_the_plan_without_another_batch() -> None:
    knobs = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "compile": "none"}
    request = make_request("qwen2.5-0.5b", gpu="24GB", knobs=knobs)
    change = left_to_the_plan(Asked(request, resolve_gpu("24GB"), resolve_model("qwen2.5-0.5b")))
    assert change is not None
    assert change.flags == "--effective-batch-size 6"
    assert change.left_out(request) == (
        "--per-device-train-batch-size",
        "--gradient-accumulation-steps",
        "--compile",
    )


def test_lists_and_fractions_are_typed_as_they_are_read() -> None:
    knobs = {"lora_dropout": 0.0, "target_modules": ("q_proj", "v_proj"), "use_dora": False}
    assert options(knobs) == "--lora-dropout 0 --target-modules q_proj,v_proj --no-use-dora"
    assert options({"lora_dropout": 0.1, "method": "lora"}) == "--lora-dropout 0.1 --method lora"


def test_setups_are_compared_in_the_words_of_the_form() -> None:
    now = TrainingSetup(
        model="qwen2.5-0.5b",
        max_length=4096,
        gradient_checkpointing=False,
        compile="regional",
        activation_memory_budget=0.1,
    )
    then = now.replace(
        max_length=2048,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        compile="none",
        activation_memory_budget=None,
        activation_offloading=True,
    )
    # A budget has no meaning without compiled layers, so that it is gone goes without saying.
    assert differences(now, then, told={"max_length"}) == (
        "micro-batch 2",
        "checkpointing on",
        "offloading on",
        "compile none",
    )
    assert differences(then, now)[0] == "max length 4,096"
    some = now.replace(gradient_checkpointing=True, activation_memory_budget=None, checkpointed_layers=3)
    assert differences(some, some.replace(checkpointed_layers=None)) == (
        "checkpointed layers: all decoder layers",
    )
