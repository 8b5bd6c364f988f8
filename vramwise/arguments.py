"""A plan as the arguments of TRL, PEFT and bitsandbytes: those that the launcher itself gives."""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from launcher.runs.training_job import TrainingJob
from launcher.training import adapters, build
from launcher.training.arguments import how_it_runs, optimisation
from planner.answers.plan import Plan
from planner.base.errors import InputError
from planner.setup.adapters import uncommon_knob
from planner.setup.training_setup import TrainingSetup

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

_TWO_NAMES = (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)


def sft_config(plan: Plan, *, output_dir: str | PathLike[str], **others: Any) -> SFTConfig:
    """TRL's arguments of a plan: what decides memory and speed, and the plan's rate, schedule and epochs.

    `model_init_kwargs` has what a model is loaded with where SFTTrainer is given its name: dtype, attention,
    safetensors alone, no remote code. `others` are arguments of SFTConfig, and win: logging, saving,
    evaluation and trackers are left to them and to TRL. PlanCallback tells which of them changes what was
    planned.

    Raises:
        InputError: the plan cannot be run by a script, or not here (a GPU, a package).
    """
    import torch
    from trl import SFTConfig

    refuse_in_script(plan.setup)
    on_gpu = torch.cuda.is_available()
    build.refuse_unsupported(plan.setup, on_gpu=on_gpu)
    given: dict[str, Any] = {
        **how_it_runs(plan.setup, on_gpu=on_gpu),
        **optimisation(_job(plan)),
        # Logits of an evaluation would be kept without it.
        "prediction_loss_only": True,
        "model_init_kwargs": _loaded_with(plan.setup, on_gpu=on_gpu),
    }
    # transformers knows these by two names, of which the newer one would win over what a script says.
    said = {name for pair in _TWO_NAMES if set(pair) & others.keys() for name in pair}
    kept = {name: value for name, value in given.items() if name not in said}
    return SFTConfig(output_dir=fspath(output_dir), **{**kept, **others})


def lora_config(plan: Plan) -> LoraConfig | None:
    """PEFT's configuration of a plan, null for full fine-tuning: SFTTrainer's `peft_config`.

    Raises:
        InputError: the plan cannot be run by a script.
    """
    refuse_in_script(plan.setup)
    return adapters.lora_config(plan.setup)


def quantization_config(plan: Plan) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration of a plan, null but for QLoRA: SFTTrainer's `quantization_config`.

    Raises:
        InputError: the plan cannot be run by a script.
    """
    refuse_in_script(plan.setup)
    return build.quantization_config(plan.setup)


def refuse_in_script(setup: TrainingSetup) -> None:
    """Refuse what neither arguments nor a callback can ask for.

    Raises:
        InputError: it needs the launcher's own loading or trainer.
    """
    why = None
    if setup.experts == "4bit" and setup.method == "qlora":
        why = "experts=4bit: transformers quantises no experts while it loads"
    elif setup.prepare_for_kbit_training:
        why = "prepare_for_kbit_training=true: the model is changed before the trainer has it"
    elif setup.num_processes > 1:
        why = f"num_processes={setup.num_processes}: no argument makes gradients and shards lie as planned"
    elif setup.image_patches or setup.vision_tower != "16bit":
        why = "images: they are read, and the tower is kept from gradients, by no argument"
    elif setup.loraplus_lr_ratio is not None:
        why = f"loraplus_lr_ratio={setup.loraplus_lr_ratio:g}: the trainer makes its optimizer"
    elif (name := uncommon_knob(setup)) is not None:
        why = f"{name}: what it trains is held in other types than TRL's trainer casts it to"
    if why is not None:
        raise InputError(f"{why}; run this plan with `vramwise train`")


def _loaded_with(setup: TrainingSetup, *, on_gpu: bool) -> dict[str, Any]:
    """What the launcher loads a model with, its quantisation apart."""
    chosen: dict[str, Any] = {"dtype": setup.dtype, "use_safetensors": True, "trust_remote_code": False}
    if setup.attn_implementation:
        chosen["attn_implementation"] = setup.attn_implementation
    # One GPU whole: "auto" may leave layers on the host.
    return {**chosen, "device_map": {"": 0} if on_gpu else None}


def _job(plan: Plan) -> TrainingJob:
    """The launcher's job of the plan; the data is the script's own."""
    schedule = plan.schedule
    return TrainingJob(
        setup=plan.setup,
        model_source=plan.model.hub_id or plan.model.id,
        data_path="the script's own",
        learning_rate=schedule.learning_rate,
        num_train_epochs=schedule.num_train_epochs,
        warmup_ratio=schedule.warmup_ratio,
        lr_scheduler_type=schedule.lr_scheduler_type,
    )
