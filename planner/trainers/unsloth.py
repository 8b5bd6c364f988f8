"""Unsloth's scripts: a call of FastLanguageModel.from_pretrained, get_peft_model and SFTConfig each.

Defaults are those of Unsloth 2026.10.9 (unsloth/models/loader.py:1241-1275, models/llama.py:4569-4592) with
TRL 1.15 and transformers 5.17, the newest that it takes. A script is read by its syntax alone and never run.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any

from planner.base.errors import InputError, shorten
from planner.setup.stack import UNSLOTH
from planner.setup.training_setup import ALL_LINEAR, TrainingSetup
from planner.trainers.config import Keys, TrainerConfig, alpha_of, kept_knobs, positive, required, schedule

VERSION = "2026.10.9"
INSTALL = f"uv venv --python 3.12 && uv pip install unsloth=={VERSION} 'trl==1.15.0' 'transformers==5.17.0'"
LACKING = (
    "experts",
    "compile",
    "activation_memory_budget",
    "checkpointed_layers",
    "selective_checkpointing",
    "prepare_for_kbit_training",
    "kernels",
    "attn_implementation",
)
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""get_peft_model's own default, all linear layers of the families that FastLanguageModel has."""
CALLS = ("from_pretrained", "get_peft_model", "SFTConfig")
SEED = 3407
"""get_peft_model's random_state."""
OFFLOADED = "unsloth"
_COPIES = {
    "-unsloth-bnb-4bit": "counted as quantised whole; this copy keeps some of its layers in 16 bits",
    "-bnb-4bit": "counted as what this copy was quantised from",
}
"""Endings of names of copies in 4 bits."""
_REFUSED = {
    "load_in_8bit": "a base in 8 bits",
    "load_in_fp8": "a base in 8 bits",
    "full_finetuning": "masters of the weights in float32",
    "fast_inference": "vLLM beside the training",
    "modules_to_save": "modules that are trained whole beside the adapter",
    "target_parameters": "parameters that are no modules",
    "unsloth_tiled_mlp": "MLPs in tiles",
    "checkpoint_skip_layers": "layers that are kept whole while others are checkpointed",
    "offload_layers": "layers on the host",
    "qat_scheme": "quantisation-aware training",
    "use_dora": "DoRA, which its kernels do not have",
}


def parse(text: str) -> Mapping[str, Any]:
    """The keyword arguments of a script's three calls, with constants of the module put in.

    What is no constant (data, tokenizers, callbacks) is left out. Of a key that stands in several calls the
    last one counts.

    Raises:
        InputError: it is no Python, or has no call of from_pretrained.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"no Python: {shorten(str(error), 120)}") from error
    constants = dict(_constants(tree))
    found: dict[str, Any] = {}
    called = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in CALLS:
            continue
        called.add(name)
        arguments = [("model_name", one) for one in call.args[:1]] if name == "from_pretrained" else []
        arguments += [(one.arg, one.value) for one in call.keywords if one.arg is not None]
        for key, node in arguments:
            value = _value(node, constants)
            if value is not _UNKNOWN:
                found[key] = value
    if "from_pretrained" not in called:
        raise InputError("no call of FastLanguageModel.from_pretrained is in it")
    return found


_UNKNOWN = object()


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = _value(node.value, {})
            if value is not _UNKNOWN:
                yield node.targets[0].id, value


def _value(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    """The constant that an expression is; torch's dtypes by their names."""
    if isinstance(node, ast.Name):
        return constants.get(node.id, _UNKNOWN)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return _UNKNOWN


def read(values: Mapping[str, Any], *, auto_dtype: str, gpus: int) -> TrainerConfig:
    """Read what `parse` found. `auto_dtype` is the card's 16-bit type, `gpus` how many there are.

    Raises:
        InputError: a key whose memory is not known, or a value that is not accepted.
    """
    keys = Keys(values)
    keys.refuse(_REFUSED)
    if gpus > 1:
        raise InputError("Unsloth on several GPUs is not planned: name one")
    if "r" not in values:
        keys.notes.append("get_peft_model: its own defaults are counted, an adapter of rank 16")
    method = "qlora" if keys.switch("load_in_4bit", default=True) else "lora"
    keys.take("load_in_16bit")
    rank = positive("r", keys.integer("r", 16))
    checkpointing = _checkpointing(keys)
    length = keys.integer("max_length", keys.integer("max_seq_length", 2048))
    keys.take("max_seq_length")
    keys.take("random_state")
    setup = TrainingSetup(
        model=_model(keys),
        max_length=positive("max_length", length),
        method=method,
        per_device_train_batch_size=positive(
            "per_device_train_batch_size", keys.integer("per_device_train_batch_size", 8)
        ),
        gradient_accumulation_steps=positive(
            "gradient_accumulation_steps", keys.integer("gradient_accumulation_steps", 1)
        ),
        dtype=_dtype(keys, auto_dtype),
        lora_r=rank,
        lora_alpha=alpha_of(keys.integer("lora_alpha", 16), rank),
        lora_dropout=keys.number("lora_dropout", 0.0) or 0.0,
        target_modules=_targets(keys),
        use_rslora=keys.switch("use_rslora"),
        optim=keys.optimizer("optim", "adamw_torch_fused", {"adamw_bnb_8bit": "adamw_8bit"}),
        gradient_checkpointing=checkpointing != "none",
        activation_offloading=checkpointing == OFFLOADED,
        packing=keys.switch("packing"),
        train_sampling_strategy=keys.text("train_sampling_strategy", "random") or "random",
    )
    keys.notes += UNSLOTH.counted
    return keys.config("unsloth", UNSLOTH, setup, epochs="num_train_epochs")


def write(setup: TrainingSetup, model: str, epochs: float, learning_rate: float) -> dict[str, Any]:
    """The keyword arguments of a script for a setup, all that decides its memory named.

    Raises:
        InputError: a knob that Unsloth does not have.
    """
    kept_knobs(setup, "Unsloth", LACKING)
    refuse(setup.method, setup.dtype, setup.use_dora, setup.num_processes)
    if setup.method == "qlora" and (
        setup.bnb_4bit_quant_type != "nf4" or not setup.bnb_4bit_use_double_quant
    ):
        raise InputError("Unsloth quantises to nf4 with double quantisation alone (models/llama.py:4017)")
    if setup.activation_offloading and not setup.gradient_checkpointing:
        raise InputError("Unsloth offloads activations with gradient_checkpointing alone")
    targets = setup.target_modules
    checkpointing: Any = OFFLOADED if setup.activation_offloading else setup.gradient_checkpointing
    return {
        "model_name": model,
        "max_seq_length": setup.max_length,
        "dtype": setup.dtype,
        "load_in_4bit": setup.method == "qlora",
        "r": setup.lora_r,
        "lora_alpha": setup.alpha,
        "lora_dropout": setup.lora_dropout,
        "target_modules": list(SEVEN if isinstance(targets, str) else targets),
        "bias": "none",
        "use_rslora": setup.use_rslora,
        "use_gradient_checkpointing": checkpointing,
        "random_state": SEED,
        "max_length": setup.max_length,
        "packing": setup.packing,
        **schedule(setup, epochs, learning_rate),
        "train_sampling_strategy": setup.train_sampling_strategy,
        "output_dir": "out",
    }


def refuse(method: str | None, dtype: str | None, dora: object, processes: int) -> None:
    """Refuse what no script of Unsloth's is planned for.

    Raises:
        InputError: which knob it is.
    """
    if method == "full":
        raise InputError("Unsloth with method full is not planned: it holds masters in float32")
    if dtype == "float32":
        raise InputError("Unsloth with dtype float32 is not planned: its kernels are of 16 bits")
    if dora:
        raise InputError("Unsloth has no use_dora with its kernels")
    if processes > 1:
        raise InputError("Unsloth on several GPUs is not planned: name one")


def script(
    values: Mapping[str, Any],
    *,
    data: str = "train.jsonl",
    adapter: str = "adapter",
    reporter: str | None = None,
) -> str:
    """The script of what `write` gives, in its order: loading, the adapter, training.

    It trains `data` and saves into the folder `adapter`. A module of the name `reporter` is imported before
    all others and its `callback()` told what is trained.
    """
    names = list(values)
    first, second = names.index("r"), names.index("random_state") + 1
    of_loading, of_adapter, rest = names[:first], names[first:second], names[second:]

    head = "" if reporter is None else f"import {reporter}  # before all others: it takes signals\n"
    told = "" if reporter is None else f"    callbacks=[{reporter}.callback()],\n"

    def lines(names: Any, indent: str) -> str:
        return "".join(f"{indent}{name}={_python(name, values[name])},\n" for name in names)

    return (
        f"{head}"
        "import torch\n"
        "import unsloth  # before trl, whose trainer it changes\n"
        "from datasets import load_dataset\n"
        "from trl import SFTConfig, SFTTrainer\n\n"
        "model, tokenizer = unsloth.FastLanguageModel.from_pretrained(\n"
        f"{lines(of_loading, '    ')})\n"
        "model = unsloth.FastLanguageModel.get_peft_model(\n"
        f"    model,\n{lines(of_adapter, '    ')})\n"
        "trainer = SFTTrainer(\n"
        "    model=model,\n"
        "    processing_class=tokenizer,\n"
        f'    train_dataset=load_dataset("json", data_files={json.dumps(data)}, split="train"),\n'
        f"{told}"
        f"    args=SFTConfig(\n{lines(rest, '        ')}    ),\n"
        ")\n"
        "trainer.train()\n"
        f"model.save_pretrained({json.dumps(adapter)})\n"
        f"tokenizer.save_pretrained({json.dumps(adapter)})\n"
    )


def _python(name: str, value: Any) -> str:
    if name == "dtype":
        return f"torch.{value}"
    return json.dumps(value) if isinstance(value, str | list) else repr(value)


def _model(keys: Keys) -> str:
    """What a copy that is quantised already was made from: its bits are those of quantising while loading."""
    name = required("model_name", keys.text("model_name"), "Unsloth")
    for ending, told in _COPIES.items():
        if name.endswith(ending):
            keys.notes.append(f"model_name: {told}")
            return name.removesuffix(ending)
    return name


def _targets(keys: Keys) -> str | tuple[str, ...]:
    targets = keys.names("target_modules") or SEVEN
    return ALL_LINEAR if targets == (ALL_LINEAR,) or set(targets) == set(SEVEN) else targets


def _checkpointing(keys: Keys) -> str:
    value = keys.take("use_gradient_checkpointing")
    if value not in (None, True, False, OFFLOADED):
        raise InputError(
            f"use_gradient_checkpointing: {value!r:.60} is not planned: True, False or 'unsloth'"
        )
    return {None: OFFLOADED, OFFLOADED: OFFLOADED, True: "all", False: "none"}[value]


def _dtype(keys: Keys, auto: str) -> str:
    named = keys.text("dtype")
    if named == "float32":
        refuse(None, named, False, 1)
    return auto if named in (None, "auto") else named
