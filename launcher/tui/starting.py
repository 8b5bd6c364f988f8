"""Make a run folder for a sizing and start its processes; blocks, so made for a worker thread."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass

from launcher.runs import supervisor
from launcher.runs.folder import RunFolder, TrainingJob, create_run_folder
from launcher.tui.inspection import inspector
from launcher.tui.screens.start_run import RunWish
from launcher.tui.sizing import Sizing
from planner.answers.plan import Plan
from planner.base.data_files import write_atomically
from planner.base.errors import InputError, MissingExtraError
from planner.planning.make_plan import make_plan
from planner.setup import defaults
from planner.setup.request import make_request

_TRAINING_STACK = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "psutil")


@dataclass(frozen=True, slots=True)
class Started:
    """A started run; `handle` keeps its processes from being reaped by nobody."""

    folder: RunFolder
    handle: supervisor.RunHandle


def refuse_what_cannot_start(sizing: Sizing) -> None:
    """Say what stands in the way of training before anything is asked.

    Raises:
        MissingExtraError: the training stack is not installed.
        InputError: several GPUs.
    """
    for name in _TRAINING_STACK:
        # Looked for, not imported: the training stack must not be loaded into this process.
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError("training", name)
    if sizing.card.target.count > 1:
        raise InputError("a run on several GPUs is sized here but cannot be started from here")


def start(sizing: Sizing, wish: RunWish) -> Started:
    """Write job.json and plan.json into a new run folder and start trainer and sampler.

    Raises:
        VramwiseError: the job is not possible, or the processes cannot be started.
    """
    rate = defaults.learning_rate(sizing.setup.method, sizing.model)
    job = TrainingJob(
        setup=sizing.setup,
        model_source=wish.model_source,
        data_path=str(wish.data),
        learning_rate=rate,
        num_train_epochs=1.0 if wish.num_train_epochs is None else wish.num_train_epochs,
        max_steps=wish.max_steps,
        warmup_ratio=defaults.WARMUP_RATIO,
        lr_scheduler_type=defaults.LR_SCHEDULER_TYPE,
        gpu_index=sizing.card.position,
    )
    plan = _plan(sizing, wish, rate)
    folder = create_run_folder(wish.runs, job)
    write_atomically(folder.plan, json.dumps(plan.to_dict(), indent=2) + "\n")
    return Started(folder, supervisor.start(folder.path))


def _plan(sizing: Sizing, wish: RunWish, rate: float) -> Plan:
    """The plan of exactly this setup, on the data that will be trained on."""
    values = sizing.setup.to_dict()
    fixed = {name: value for name, value in values.items() if name != "model" and value is not None}
    # Null is the model's own attention; with packing a plan would choose.
    fixed.setdefault("attn_implementation", sizing.model.default_attn_implementation)
    request = make_request(
        sizing.setup.model,
        knobs=fixed,
        gpu=sizing.card.argument,
        data=str(wish.data),
        learning_rate=rate,
        num_train_epochs=wish.num_train_epochs,
    )
    return make_plan(request, inspector=inspector)
