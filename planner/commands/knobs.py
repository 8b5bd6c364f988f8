"""Every TrainingSetup key as a command-line option, named as TRL, PEFT and bitsandbytes name it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from planner.base.errors import FieldError
from planner.commands.program import StoreOnce, SwitchOnce, real_number, whole_number
from planner.setup import training_setup as names
from planner.setup.request import KNOB_NAMES, KnobValue


@dataclass(frozen=True, slots=True)
class _Knob:
    kind: str
    help: str
    choices: tuple[str, ...] = ()


_KNOBS: dict[str, _Knob] = {
    "method": _Knob("choice", "how to train (default: qlora)", names.METHODS),
    "max_length": _Knob("int", "tokens per sequence"),
    "per_device_train_batch_size": _Knob("int", "sequences of one forward pass"),
    "gradient_accumulation_steps": _Knob("int", "forward passes of one optimizer step"),
    "dtype": _Knob("choice", "how the base is loaded (default: what the GPU computes in)", names.DTYPES),
    "bnb_4bit_use_double_quant": _Knob("bool", "quantise the quantisation constants too (default: yes)"),
    "bnb_4bit_quant_type": _Knob("choice", "4-bit type (default: nf4)", names.QUANT_TYPES),
    "lora_r": _Knob("int", "rank of the adapter (default: 16)"),
    "lora_alpha": _Knob("int", "scale of the adapter (default: twice the rank)"),
    "lora_dropout": _Knob("float", "dropout before the adapter (default: 0)"),
    "target_modules": _Knob("names", "all-linear, or module names: q_proj,v_proj (default: all-linear)"),
    "use_dora": _Knob("bool", "DoRA"),
    "use_rslora": _Knob("bool", "rank-stabilised scaling"),
    "optim": _Knob(
        "choice", "optimizer (default: adamw_8bit; adamw_torch_fused if faster)", names.OPTIMIZERS
    ),
    "gradient_checkpointing": _Knob("bool", "keep layer inputs only and compute layers again"),
    "checkpointed_layers": _Knob("int", "checkpoint the first K decoder layers only"),
    "selective_checkpointing": _Knob("bool", "keep attention outputs when checkpointing"),
    "activation_offloading": _Knob("bool", "move activations to host memory"),
    "attn_implementation": _Knob(
        "choice",
        "attention (default: the model's, or flex_attention for packed examples if faster)",
        names.ATTENTION_IMPLEMENTATIONS,
    ),
    "kernels": _Knob("choice", "replacement kernels (default: none)", names.KERNELS),
    "compile": _Knob("choice", "compile each decoder layer (default: if faster)", names.COMPILE),
    "activation_memory_budget": _Knob("float", "0 to 1, with --compile and --no-gradient-checkpointing"),
    "prepare_for_kbit_training": _Knob("bool", "PEFT's upcast of everything unquantised to float32"),
    "packing": _Knob("bool", "several examples a sequence"),
    "train_sampling_strategy": _Knob(
        "choice", "which examples share a batch (default: random)", names.SAMPLING_STRATEGIES
    ),
    "num_processes": _Knob("int", "GPUs (default: as --gpu says)"),
    "distributed": _Knob("choice", "how several GPUs share the work (default: ddp)", names.DISTRIBUTED),
}


def add_knobs(parser: argparse.ArgumentParser) -> None:
    """Add one option for each TrainingSetup key but the model."""
    group = parser.add_argument_group("knobs", "What is given here is fixed; the rest is chosen.")
    for name in KNOB_NAMES:
        knob = _KNOBS[name]
        flag = "--" + name.replace("_", "-")
        if knob.kind == "bool":
            group.add_argument(flag, dest=name, action=SwitchOnce, default=None, help=knob.help)
        elif knob.kind == "choice":
            shown = f"{knob.help}: {', '.join(knob.choices)}"
            group.add_argument(
                flag, dest=name, action=StoreOnce, choices=knob.choices, help=shown, metavar="NAME"
            )
        else:
            kind: Any = {"int": whole_number, "float": real_number, "names": _names}[knob.kind]
            metavar = {"int": "N", "float": "X", "names": "NAMES"}[knob.kind]
            group.add_argument(flag, dest=name, action=StoreOnce, type=kind, help=knob.help, metavar=metavar)


def given_knobs(args: argparse.Namespace) -> tuple[tuple[str, KnobValue], ...]:
    """The knobs that were given, in the contract's order."""
    return tuple((name, getattr(args, name)) for name in KNOB_NAMES if getattr(args, name) is not None)


def _names(text: str) -> str | tuple[str, ...]:
    if text == names.ALL_LINEAR:
        return text
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise FieldError("target_modules", text, "all-linear, or names with commas between them")
    return found
