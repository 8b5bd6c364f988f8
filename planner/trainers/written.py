"""Files for other trainers: a config with what it was planned for as comments, accelerate's beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planner.answers.plan import Plan
from planner.base.data_files import write_all
from planner.base.errors import InputError
from planner.setup.adapters import UNCOMMON, UNCOMMON_OPTIMIZERS
from planner.setup.training_setup import TrainingSetup
from planner.trainers.files import Trainer
from planner.trainers.planned import STACK_OF

ACCELERATE = "accelerate.yaml"
_GIB = 2**30


def write_files(trainer: Trainer, plan: Plan, folder: Path) -> tuple[Path, ...]:
    """Write a plan for a trainer into a folder, each file whole or not at all; the files that were written.

    Raises:
        InputError: a knob that the trainer does not have, or a folder that cannot be written to.
    """
    texts = {trainer.file: config_text(trainer, plan)}
    if trainer.name == "trl" and plan.setup.num_processes > 1:
        texts[ACCELERATE] = _yaml(accelerate_of(plan.setup))
    return write_all(folder, texts)


def config_text(trainer: Trainer, plan: Plan) -> str:
    """The config of a plan for a trainer, as its file has it.

    Raises:
        InputError: a knob that is not written, or with which the trainer would need other memory.
    """
    for name, plain in (("loraplus_lr_ratio", None), ("init_lora_weights", "default"), *UNCOMMON):
        if getattr(plan.setup, name) != plain:
            raise InputError(f"{name} is not written for {trainer.title}: leave it out")
    if plan.setup.optim in UNCOMMON_OPTIMIZERS:
        raise InputError(f"optim {plan.setup.optim} is not written for {trainer.title}: name another")
    if plan.setup.load_in_8bit:
        raise InputError(
            f"load_in_8bit is not written for {trainer.title}: there bitsandbytes keeps the input of every "
            "product of weights in 8 bits beyond its checkpoint"
        )
    values = trainer.write(
        plan.setup, plan.model.hub_id, plan.schedule.num_train_epochs, plan.schedule.learning_rate
    )
    head = "".join(f"# {line}\n" for line in _head(trainer, plan))
    return head + (_yaml(values) if trainer.script is None else trainer.script(values))


def start_of(trainer: Trainer, setup: TrainingSetup) -> str:
    """The command that starts a run with the written files, with the allocator that was counted with."""
    count = setup.num_processes
    if count == 1:
        return trainer.start
    return {
        "trl": f"trl sft --config {trainer.file} --accelerate_config {ACCELERATE}",
        "llamafactory": f"FORCE_TORCHRUN=1 NPROC_PER_NODE={count} {trainer.start}",
        "axolotl": f"{trainer.start} --num-processes {count}",
    }[trainer.name]


def accelerate_of(setup: TrainingSetup) -> dict[str, Any]:
    """accelerate's own file for the GPUs of a setup."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "num_machines": 1,
        "num_processes": setup.num_processes,
        "mixed_precision": {"bfloat16": "bf16", "float16": "fp16"}.get(setup.dtype, "no"),
    }


def _head(trainer: Trainer, plan: Plan) -> Iterator[str]:
    memory, speed = plan.memory, plan.speed
    expected, most = memory.peak_bytes / _GIB, memory.peak_upper_bytes / _GIB
    yield f"Planned by vramwise for {trainer.title} {trainer.version} on {plan.gpu.text.strip()}."
    yield f"Expected: {expected:.2f} GiB, at most {most:.2f} of {plan.gpu.usable_bytes / _GIB:.2f},"
    yield "this trainer's own loss, adapter's dtype and allocator counted."
    if speed is not None:
        low, high = speed.tokens_per_second_low, speed.tokens_per_second_high
        rate = f"{speed.tokens_per_second:,.0f} tokens a second ({low:,.0f} to {high:,.0f})"
        measured = STACK_OF[trainer.name].measured_speed
        yield f"Expected{' with the kernels of TRL' if measured is None else ''}: {rate}."
        if measured is not None:
            yield f"{measured.words}."
    yield f"Install: {trainer.install}"
    yield f"Start:   {start_of(trainer, plan.setup)}"
    yield from (f"Counted otherwise: {note}." for note in STACK_OF[trainer.name].counted)
    yield "The data section is to be filled in."


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110))
