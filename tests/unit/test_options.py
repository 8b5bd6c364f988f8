"""Setups as a person types them: what advice says to type is what the command line reads."""

from __future__ import annotations

from typing import Any

import pytest

from planner.commands.knobs import add_knobs, given_knobs
from planner.commands.program import Parser
from planner.gpus.target import resolve_gpu
from planner.models.catalog import resolve_model
from planner.planning.savings import all_together, savings
from planner.setup.methods import with_method
from planner.setup.options import options_between
from planner.setup.training_setup import FIELD_NAMES, TrainingSetup

WASTEFUL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "dtype": "float32",
    "attn_implementation": "eager",
    "optim": "adamw_torch",
}
SETUPS = {
    "qlora": {**WASTEFUL, "bnb_4bit_use_double_quant": False, "prepare_for_kbit_training": True},
    "lora": {**WASTEFUL, "method": "lora", "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05},
    "dora": {"use_dora": True, "checkpointed_layers": 3},
    "full": {**WASTEFUL, "method": "full", "gradient_checkpointing": False},
    "budget": {"compile": "regional", "gradient_checkpointing": False, "activation_memory_budget": 0.5},
}


@pytest.mark.parametrize("knobs", SETUPS.values(), ids=SETUPS)
def test_what_advice_says_to_type_is_the_changed_setup(knobs: dict[str, Any]) -> None:
    model = resolve_model("qwen2.5-0.5b")
    setup = TrainingSetup(model=model.id, max_length=4096, **knobs)
    parser = Parser()
    add_knobs(parser)
    target = resolve_gpu("24GB")
    together = all_together(setup, model, target)
    assert together is not None
    for change in (*(one for kind in savings(setup, model, target) for one in kind), together):
        typed = dict(given_knobs(parser.parse_args(change.flags.split())))
        assert typed, change.title
        assert change.setup == change.setup.replace(**typed)
        same_method = with_method(setup, change.setup.method)
        for name in FIELD_NAMES:
            value = getattr(change.setup, name)
            if value is not None and value != getattr(same_method, name):
                assert name in typed, change.title


def test_what_a_method_brings_with_it_is_not_typed() -> None:
    prepared = TrainingSetup(model="qwen2.5-0.5b", max_length=512, prepare_for_kbit_training=True)
    assert options_between(prepared, with_method(prepared, "lora")) == "--method lora"


def test_all_layers_are_asked_for_by_checkpointing_itself() -> None:
    some = TrainingSetup(model="qwen2.5-0.5b", max_length=512, checkpointed_layers=3)
    assert options_between(some, some.replace(checkpointed_layers=None)) == "--gradient-checkpointing"


def test_lists_and_fractions_are_typed_as_they_are_read() -> None:
    setup = TrainingSetup(model="qwen2.5-0.5b", max_length=512, lora_dropout=0.1)
    changed = setup.replace(target_modules=("q_proj", "v_proj"), lora_dropout=0.0)
    assert options_between(setup, changed) == "--lora-dropout 0 --target-modules q_proj,v_proj"
    assert options_between(changed, setup) == "--lora-dropout 0.1 --target-modules all-linear"
