"""A plan in a script of one's own: the README's, with a tiny model, beside what the launcher builds."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import vramwise
from launcher.models.inspect import inspect_config
from launcher.training import build
from launcher.training.arguments import sft_config
from launcher.training.callbacks import decoder_layers
from planner.base.data_files import PROFILES
from vramwise.arguments import _job

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MODEL = PROFILES / "demo" / "model"
README_PLAN = 'plan = vramwise.make_plan(vramwise.make_request("llama-3.2-1b", gpu="12GB"))\n'
IN_SECONDS = {"method": "lora", "dtype": "float32", "compile": "none", "max_length": 64, "lora_r": 4}
WRITTEN = (
    *("logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "save_strategy"),
    *(
        "report_to",
        "project",
        "run_name",
        "disable_tqdm",
        "output_dir",
        "model_init_kwargs",
        "trackio_static_space_id",
    ),
)
"""What is written, which is the script's own, and how a model that has a name alone is loaded."""


def plan_of(**knobs: Any) -> vramwise.Plan:
    """A plan for the demo's model, which is described in this process: it has imported what that needs."""
    spec = inspect_config(MODEL, model_id=str(MODEL), hub_id=str(MODEL))
    request = vramwise.make_request(str(MODEL), gpu="12GB", knobs={**IN_SECONDS, **knobs})
    return vramwise.make_plan(request, model=spec, whole=False)


def readme_script() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "SFTTrainer" in block]
    assert README_PLAN in script
    return str(script)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = (PROFILES / "demo" / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:24]))
    return tmp_path


def test_the_readmes_script_trains_and_compares(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(per_device_train_batch_size=2, gradient_accumulation_steps=2, checkpointed_layers=1)
    script = (
        readme_script().replace(README_PLAN, "").replace("logging_steps=1", "logging_steps=1, max_steps=4")
    )
    assert len(script.splitlines()) <= 15
    names: dict[str, Any] = {"plan": plan}
    exec(script, names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 4
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"] + 1
    assert [layer.gradient_checkpointing for layer in decoder_layers(trainer.model)] == [
        True,
        False,
        False,
        False,
    ]
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, vramwise.PlanCallback)]
    found = callback.comparison
    assert found is not None
    assert found.measured_tokens_per_second is not None
    assert found.predicted_tokens_per_second == plan.speed.tokens_per_second
    # Nothing differs but the machine: this has no GPU, and releases of its own.
    packages = {name for name, _ in plan.memory.basis.stack_versions}
    assert {one.name for one in found.differences} - packages == {"GPU"}
    out = capsys.readouterr().out
    assert "not as planned: GPU: planned NVIDIA GeForce RTX 3060, here none" in out
    assert "memory: not measured without a GPU" in out


def test_what_a_script_does_otherwise_is_named(here: Path) -> None:
    """Each of these changes memory or speed, and is told before the first step."""
    from datasets import Dataset
    from trl import SFTTrainer

    plan, told = plan_of(per_device_train_batch_size=2), []
    others = {
        "per_device_train_batch_size": 1,
        "optim": "sgd",
        "gradient_checkpointing": True,
        "max_steps": 1,
    }
    peft = vramwise.lora_config(plan)
    assert peft is not None
    peft.r, peft.lora_dropout, peft.target_modules = 2, 0.1, {"q_proj"}
    trainer = SFTTrainer(
        model=str(MODEL),
        args=vramwise.sft_config(plan, output_dir=here / "out", **others),
        train_dataset=Dataset.from_list([{"text": "a short one"}] * 4),
        peft_config=peft,
        callbacks=[vramwise.PlanCallback(plan, tell=told.append)],
    )
    trainer.train()
    named = {line.split(": ")[1] for line in told if line.startswith("not as planned")}
    assert named >= {
        "per_device_train_batch_size",
        "optim",
        "activation_checkpointing",
        "r",
        "lora_dropout",
        "trained parameters",
        "tokens of the longest example",
        "GPU",
    }
    assert "not as planned: per_device_train_batch_size: planned 2, here 1" in told
    assert not named & {
        "max_length",
        "packing",
        "dtype of the embedding",
        "attn_implementation",
        "decoder layers",
    }


SETUPS: tuple[dict[str, Any], ...] = (
    {"packing": True, "per_device_train_batch_size": 2},
    {"gradient_checkpointing": True, "selective_checkpointing": True, "optim": "adamw_8bit"},
    {"method": "full", "lora_r": 16, "dtype": "bfloat16", "train_sampling_strategy": "group_by_length"},
    {"method": "qlora", "use_dora": True, "bnb_4bit_quant_type": "fp4", "target_modules": ("q_proj",)},
)


def test_arguments_are_those_that_the_launcher_gives(here: Path) -> None:
    for knobs in SETUPS:
        plan = plan_of(**knobs)
        mine = vramwise.sft_config(plan, output_dir=here / "out")
        its = sft_config(plan.setup, _job(plan), output_dir=here / "out", on_gpu=False, evaluates=False)
        differing = [
            field.name
            for field in dataclasses.fields(mine)
            if field.name not in WRITTEN and getattr(mine, field.name) != getattr(its, field.name)
        ]
        assert differing == [], knobs
        for ours, theirs in (
            (vramwise.lora_config(plan), build.lora_config(plan.setup)),
            (vramwise.quantization_config(plan), build.quantization_config(plan.setup)),
        ):
            assert (ours and ours.to_dict()) == (theirs and theirs.to_dict())
    assert mine.model_init_kwargs["dtype"] == "float32"


def test_what_no_argument_says_is_set_and_what_nothing_can_set_is_refused(here: Path) -> None:
    plan = plan_of(gradient_checkpointing=True, selective_checkpointing=True, method="qlora")
    model = build.load_model(plan.setup, str(MODEL), device=torch.device("cpu"), allow_download=False)
    callback = vramwise.PlanCallback(plan)
    args = vramwise.sft_config(plan, output_dir=here)
    callback.on_init_end(args, None, None, model=model)  # type: ignore[arg-type]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in decoder_layers(model):
        assert "context_fn" in layer._gradient_checkpointing_func.keywords
    for knobs, named in (
        ({"prepare_for_kbit_training": True}, "prepare_for_kbit_training=true"),
        ({"num_processes": 2, "distributed": "ddp"}, "num_processes=2"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        refused = dataclasses.replace(plan, setup=plan.setup.replace(selective_checkpointing=False, **knobs))
        for ask in (
            lambda plan=refused: vramwise.sft_config(plan, output_dir=here),
            lambda plan=refused: vramwise.lora_config(plan),
            lambda plan=refused: vramwise.PlanCallback(plan),
        ):
            with pytest.raises(vramwise.InputError, match=f"{named}.*vramwise train"):
                ask()


def test_without_the_stack_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.runs.stack.NEEDED", ("no_such_package",))
    for name in ("sft_config", "lora_config", "quantization_config", "PlanCallback"):
        with pytest.raises(vramwise.VramwiseError, match=f"vramwise.{name}.*no_such_package"):
            getattr(vramwise, name)


def test_a_saved_plan_is_read_back(here: Path) -> None:
    plan = plan_of()
    saved = json.loads(json.dumps(plan.to_dict()))
    assert vramwise.lora_config(vramwise.Plan.from_dict(saved)).r == plan.setup.lora_r  # type: ignore[union-attr]
    shutil.rmtree(here / "cache", ignore_errors=True)
