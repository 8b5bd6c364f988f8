"""TrainingSetup and TrainingJob -> SFTConfig, the arguments of TRL's trainer.

Every argument that changes memory, speed or result is given, so that an upstream default cannot change a run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.runs.trackers import PROJECT
from launcher.runs.training_job import TrainingJob
from launcher.training.several.ranks import WAIT
from planner.setup.adapters import UNCOMMON_OPTIMIZERS
from planner.setup.training_setup import TrainingSetup

if TYPE_CHECKING:
    from trl import SFTConfig


IMAGE_WORKERS = 2
"""Processes that read images for the step, each two batches ahead."""
METRIC = "eval_loss"
"""What evaluations are compared by: less is better."""


def sft_config(
    setup: TrainingSetup, job: TrainingJob, *, output_dir: Path, on_gpu: bool, evaluates: bool
) -> SFTConfig:
    """TRL's arguments of the run."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(output_dir),
        **how_it_runs(setup, on_gpu=on_gpu),
        **several_gpus(setup),
        **optimisation(job),
        **_written(job, evaluates=evaluates, run_name=output_dir.parent.name),
    )


def how_it_runs(setup: TrainingSetup, *, on_gpu: bool) -> dict[str, Any]:
    """The arguments that decide what one process holds and how fast it is."""
    from trl import SFTConfig

    return {
        **_batches(setup),
        **_loss(),
        **_memory_and_speed(setup, on_gpu=on_gpu),
        **checkpointing(setup, SFTConfig),
    }


def checkpointing(setup: TrainingSetup, config: type) -> dict[str, Any]:
    """Gradient checkpointing by the names that `config`, a dataclass of the installed transformers, has.

    transformers 5.24 calls it activation checkpointing and warns of the older names, which 6 will not have
    (transformers/training_args.py, TrainingArguments.__post_init__).
    """
    known = {field.name for field in dataclasses.fields(config)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    options = {"use_reentrant": False} if setup.gradient_checkpointing else None
    return {name: setup.gradient_checkpointing, f"{name}_kwargs": options}


def several_gpus(setup: TrainingSetup) -> dict[str, Any]:
    """How ranks share the work; nothing for one process. What each holds: docs/several-gpus.md."""
    if setup.num_processes == 1:
        return {}
    common: dict[str, Any] = {
        "ddp_timeout": int(WAIT.total_seconds()),
        "accelerator_config": {"split_batches": False, "even_batches": True},
    }
    if setup.distributed == "ddp":
        # Every adapter has a gradient in every step: looking for those without costs a pass over the graph.
        # The only buffers are rotary frequencies, which all ranks compute alike.
        return {**common, "ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
    # Each micro-step sums gradients over the ranks: kept until the last one they would be whole on each GPU.
    common["accelerator_config"]["gradient_accumulation_kwargs"] = {"sync_each_batch": True}
    options = {
        "version": 2,
        # The units are made where the weights are loaded (launcher/training/several/units.py).
        "auto_wrap_policy": "NO_WRAP",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
        # FSDP's own recomputes with other dropout masks (accelerate/utils/fsdp_utils.py, fsdp2_apply_ac).
        "activation_checkpointing": False,
    }
    return {**common, "fsdp": True, "fsdp_config": options}


def _batches(setup: TrainingSetup) -> dict[str, Any]:
    """How examples become batches."""
    return {
        "per_device_train_batch_size": setup.per_device_train_batch_size,
        "per_device_eval_batch_size": setup.per_device_train_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "max_length": setup.max_length,
        "truncation_mode": "keep_start",
        "packing": setup.packing,
        "packing_strategy": "bfd",
        "padding_free": False,
        # A packed batch is one row; padded to all that it could hold, it has the same shape every time.
        "pad_to_multiple_of": setup.tokens_per_micro_step if setup.packing else None,
        "eval_packing": setup.packing,
        "shuffle_dataset": False,
        "dataloader_drop_last": False,
        "train_sampling_strategy": setup.train_sampling_strategy,
    }


def _loss() -> dict[str, Any]:
    """What is learned from: the labels that launcher.training.dataset has made."""
    return {
        "completion_only_loss": None,
        "assistant_only_loss": False,
        "loss_type": "nll",
        "label_smoothing_factor": 0.0,
        "average_tokens_across_devices": True,
        # TRL takes a mixture's loss for balanced experts wherever its config has a coefficient, though
        # published configs ask for none (output_router_logits; findings/balance-loss-nobody-asked-for.sh).
        # What that keeps of every layer's router no plan counts, and it fails where a config calls the
        # number of experts otherwise (Llama 4).
        "router_aux_loss_coef": 0.0,
    }


def _memory_and_speed(setup: TrainingSetup, *, on_gpu: bool) -> dict[str, Any]:
    """How a step is executed, checkpointing apart."""
    return {
        "activation_offloading": setup.activation_offloading,
        "use_liger_kernel": setup.kernels == "liger",
        "torch_compile": False,
        "torch_empty_cache_steps": None,
        "auto_find_batch_size": False,
        "use_cache": False,
        "bf16": setup.dtype == "bfloat16",
        "fp16": setup.dtype == "float16",
        "tf32": None,  # build.allow_tf32() sets it
        "use_cpu": not on_gpu,
        # LaunchedTrainer makes the others, under a name that transformers accepts.
        "optim": "adamw_torch" if setup.optim in UNCOMMON_OPTIMIZERS else setup.optim,
        # docs/decisions.md; images are read while the step before runs (launcher/training/images/batches.py).
        "dataloader_num_workers": IMAGE_WORKERS if setup.image_patches else 0,
        "dataloader_prefetch_factor": 2 if setup.image_patches else None,
        "dataloader_persistent_workers": False,
        "dataloader_pin_memory": on_gpu,
    }


def optimisation(job: TrainingJob) -> dict[str, Any]:
    """Rate, schedule, length and seeds."""
    return {
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": job.lr_scheduler_type,
        "warmup_steps": job.warmup_ratio,
        "weight_decay": job.weight_decay,
        "max_grad_norm": job.max_grad_norm,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "num_train_epochs": job.num_train_epochs,
        "max_steps": job.max_steps or -1,
        "seed": job.seed,
        "data_seed": job.seed,
    }


def _written(job: TrainingJob, *, evaluates: bool, run_name: str) -> dict[str, Any]:
    """What is written, and to whom: the run folder alone."""
    return {
        "logging_strategy": "steps",
        "logging_steps": job.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": ("steps" if job.eval_steps else "epoch") if evaluates else "no",
        "eval_steps": job.eval_steps if evaluates else None,
        "prediction_loss_only": True,
        "save_strategy": "no",  # launcher/training/saving.py says when
        "save_total_limit": None,
        "save_only_model": False,
        "load_best_model_at_end": False,  # launcher/training/train.py saves it, without loading
        "metric_for_best_model": METRIC if evaluates else None,
        "greater_is_better": False if evaluates else None,
        "report_to": "none",  # launcher/training/tracking.py adds the trackers
        "project": PROJECT,
        "run_name": run_name,
        "trackio_space_id": None,
        "trackio_static_space_id": False,
        "push_to_hub": False,
        "disable_tqdm": True,
        "trust_remote_code": False,
    }
