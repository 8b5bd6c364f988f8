"""Files that are written for other trainers, held to what those accept.

`trl sft` parses them itself. Axolotl, LLaMA-Factory and Unsloth want environments of their own, so their
wheels' sources are read: unpack them (`pip download --no-deps axolotl==0.21.0 llamafactory==0.9.5
unsloth==2026.10.9`) into one folder and name it in VRAMWISE_TRAINERS.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import yaml
from transformers import TrainingArguments

from planner.setup.training_setup import TrainingSetup
from planner.trainers.files import TRAINERS

WHEELS = os.environ.get("VRAMWISE_TRAINERS")
HUB = "meta-llama/Llama-3.1-8B"
SETUPS = [
    TrainingSetup(model=HUB, max_length=1024, use_rslora=True, packing=True, lora_dropout=0.05),
    TrainingSetup(
        model=HUB, max_length=1024, method="lora", target_modules=("q_proj",), attn_implementation="sdpa"
    ),
    TrainingSetup(model=HUB, max_length=512, method="full", gradient_checkpointing=True),
    TrainingSetup(model=HUB, max_length=512, train_sampling_strategy="group_by_length"),
]


def written(trainer: str) -> Iterator[dict[str, Any]]:
    for setup in SETUPS:
        yield TRAINERS[trainer].write(setup, HUB, 3.0, 2e-4)


def test_trl_s_command_line_takes_what_is_written(tmp_path: Path) -> None:
    from trl.scripts.sft import make_parser

    path = tmp_path / "sft.yaml"
    for setup, values in zip(SETUPS, written("trl"), strict=True):
        path.write_text(yaml.safe_dump({**values, "use_cpu": True}))
        _, training, model, *_ = make_parser().parse_args_and_config(
            ["--config", str(path)], fail_with_unknown_args=True
        )
        assert training.max_length == setup.max_length
        assert training.packing is setup.packing
        assert model.load_in_4bit is (setup.method == "qlora")
        assert model.use_peft is setup.uses_lora
        if setup.uses_lora:
            assert (model.lora_r, model.lora_alpha) == (setup.lora_r, setup.alpha)
        if setup.method == "qlora":
            assert model.use_bnb_nested_quant is setup.bnb_4bit_use_double_quant


def test_trl_s_defaults_are_those_that_are_read() -> None:
    from trl import ModelConfig, SFTConfig

    found = TRAINERS["trl"].read(
        {
            "model_name_or_path": HUB,
            "use_peft": True,
            "load_in_4bit": True,
            "lora_target_modules": "all-linear",
            "bf16": False,
        },
        auto_dtype="bfloat16",
        gpus=1,
    )
    training = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    model = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    setup = found.setup
    assert setup.max_length == training["max_length"]
    assert setup.per_device_train_batch_size == training["per_device_train_batch_size"]
    assert setup.gradient_accumulation_steps == training["gradient_accumulation_steps"]
    assert (setup.lora_r, setup.alpha) == (model["lora_r"], model["lora_alpha"])
    assert setup.lora_dropout == model["lora_dropout"]
    assert setup.bnb_4bit_use_double_quant is model["use_bnb_nested_quant"]
    assert setup.bnb_4bit_quant_type == model["bnb_4bit_quant_type"]
    assert setup.dtype == model["dtype"]


def fields_of(*files: Path) -> set[str]:
    """Annotated attributes of all classes of sources."""
    found: set[str] = set()
    for path in files:
        for one in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(one, ast.ClassDef):
                found |= {
                    part.target.id
                    for part in one.body
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
                }
    return found


@pytest.mark.skipif(WHEELS is None, reason="VRAMWISE_TRAINERS names no folder with unpacked wheels")
def test_unsloth_knows_every_argument_that_is_written_and_has_the_defaults_that_are_read() -> None:
    models = Path(WHEELS or "") / "unsloth" / "unsloth" / "models"
    known: dict[str, dict[str, ast.expr]] = {}
    for file, name, function in (
        ("loader.py", "FastLanguageModel", "from_pretrained"),
        ("llama.py", "FastLlamaModel", "get_peft_model"),
    ):
        tree = ast.parse((models / file).read_text(encoding="utf-8"))
        (owner,) = [one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == name]
        (found,) = [one for one in owner.body if isinstance(one, ast.FunctionDef) and one.name == function]
        names = [one.arg for one in found.args.args]
        known[function] = dict(zip(names[-len(found.args.defaults) :], found.args.defaults, strict=True))
    training = {field.name for field in dataclasses.fields(TrainingArguments)} | {"max_length", "packing"}
    setups = [setup for setup in SETUPS if setup.method != "full" and setup.attn_implementation is None]
    for setup in setups:
        values = TRAINERS["unsloth"].write(setup, HUB, 3.0, 2e-4)
        accepted = known["from_pretrained"].keys() | known["get_peft_model"].keys() | training
        assert set(values) <= accepted
    # What the engine's script has beside (launcher/training/engines/script.py).
    assert "use_exact_model_name" in known["from_pretrained"]
    assert {"include_num_input_tokens_seen", "warmup_steps", "save_strategy"} <= training
    defaults = {
        name: ast.literal_eval(value)
        for function in known.values()
        for name, value in function.items()
        if isinstance(value, ast.Constant)
    }
    read = TRAINERS["unsloth"].read({"model_name": HUB}, auto_dtype="bfloat16", gpus=1).setup
    assert (read.max_length, read.lora_r, read.alpha, read.lora_dropout) == tuple(
        defaults[name] for name in ("max_seq_length", "r", "lora_alpha", "lora_dropout")
    )
    assert defaults["use_gradient_checkpointing"] == "unsloth"
    assert defaults["load_in_4bit"] is True


@pytest.mark.skipif(WHEELS is None, reason="VRAMWISE_TRAINERS names no folder with unpacked wheels")
def test_axolotl_and_llama_factory_know_every_key_that_is_written() -> None:
    root = Path(WHEELS or "")
    schemas = fields_of(*(root / "axolotl" / "axolotl" / "utils" / "schemas").glob("*.py"))
    parameters = fields_of(*(root / "llamafactory" / "llamafactory" / "hparams").glob("*.py"))
    parameters |= {field.name for field in dataclasses.fields(TrainingArguments)}
    assert schemas
    for name, known in (("axolotl", schemas), ("llamafactory", parameters)):
        unknown = {key for values in written(name) for key in values if key not in known}
        assert unknown == set(), name


VALIDATIONS = {
    "axolotl": """
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig

card = {"bf16": True, "fp8": False, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_89", "tf32": True}

def taken(values):
    assert set(values) <= set(AxolotlInputConfig.model_fields)
    there = {"torch_version": "2.13.0"}
    found = validate_config(DictDefault(values), capabilities=card, env_capabilities=there)
    return [found.sequence_len, found.micro_batch_size, found.lora_r or 0]
""",
    "llamafactory": """
from llamafactory.hparams import get_train_args

def taken(values):
    _, data, training, finetuning, _ = get_train_args({**values, "use_cpu": True})
    return [data.cutoff_len, training.per_device_train_batch_size, finetuning.lora_rank]
""",
}
"""What each trainer's own validation makes of a file's settings: length, batch, rank."""


@pytest.mark.skipif(WHEELS is None, reason="VRAMWISE_TRAINERS names no folder with unpacked wheels")
@pytest.mark.parametrize("trainer", VALIDATIONS)
def test_a_trainer_s_own_validation_takes_what_is_written(trainer: str) -> None:
    root = Path(WHEELS or "")
    if not (root / f"{trainer}-packages").is_dir():
        pytest.skip(f"{trainer}-packages, what it needs beside, is not there")
    # Full fine-tuning is in 16 bits there, which no validation takes on a CPU.
    setups = [setup for setup in SETUPS if setup.method != "full" or trainer == "axolotl"]
    values = [TRAINERS[trainer].write(setup, HUB, 3.0, 2e-4) for setup in setups]
    code = (
        VALIDATIONS[trainer]
        + "\nimport json, sys\nprint(json.dumps([taken(v) for v in json.load(sys.stdin)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(root / name) for name in (trainer, f"{trainer}-packages")),
            "AXOLOTL_DO_NOT_TRACK": "1",
        },
        input=json.dumps(values),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # LLaMA-Factory takes a token off packed rows (hparams/data_args.py:189).
    less = [s.packing and trainer == "llamafactory" for s in setups]
    wanted = [
        [s.max_length - one, s.per_device_train_batch_size, s.lora_r if s.uses_lora else 0]
        for s, one in zip(setups, less, strict=True)
    ]
    assert found == wanted
