"""The job of a run: what its training process does.

Light: no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.runs import trackers
from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup

JOB_SCHEMA_VERSION = 1
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
OWN_ENGINE = "trl"
ENGINES = (OWN_ENGINE, "unsloth")
SEED = 42
"""Of order, adapter and dropout, where none is asked for: transformers' own (TrainingArguments.seed)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """What one training process does: the setup, where model and data are, and the training arguments.

    `model_source` is a folder or a Hub id; a Hub id is fetched only with `allow_download`, else it must be in
    the Hugging Face cache. `max_steps` overrides `num_train_epochs`. `warmup_ratio` is a share of all steps.
    `eval_steps` is null for an evaluation after each epoch. `eval_split` is what of the data is evaluated on
    instead of trained on: below 1 a share, else a number of examples. Training ends early when the evaluation
    loss has not fallen `early_stopping_patience` times in a row. `checkpoints` are saved every `save_steps`
    steps, and `save_minutes` after the last one and at the end of each epoch; with both null every
    defaults.SAVE_MINUTES. The newest `keep_checkpoints` are kept, and that of the best evaluation.
    `assistant_only_loss` takes the loss on the assistant's
    turns alone and needs a chat template with generation markers. `gpu_index` counts GPUs by PCI bus id,
    within CUDA_VISIBLE_DEVICES when that is set; with several GPUs it is the first of those of this machine.
    `nnodes` machines train together, this one as `node_rank`, and meet at `rdzv_endpoint` (host:port of the
    first), as torchrun names them; each has its share of the setup's processes. `track` names trackers that
    are told the figures too (launcher/runs/trackers.py); they write into the run folder alone unless
    `allow_upload`. `engine` is what trains: the launcher's own trainer ("trl"), or another one that is
    installed in an environment of its own, whose interpreter `engine_python` is.
    """

    setup: TrainingSetup
    model_source: str
    data_path: str
    eval_data_path: str | None = None
    eval_split: float | None = None
    early_stopping_patience: int | None = None
    learning_rate: float = defaults.LORA_LEARNING_RATE
    num_train_epochs: float = defaults.EPOCHS
    max_steps: int | None = None
    warmup_ratio: float = defaults.WARMUP_RATIO
    lr_scheduler_type: str = defaults.LR_SCHEDULER_TYPE
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = SEED
    logging_steps: int = 1
    checkpoints: bool = True
    save_steps: int | None = None
    save_minutes: float | None = None
    keep_checkpoints: int = defaults.KEPT_CHECKPOINTS
    eval_steps: int | None = None
    assistant_only_loss: bool = False
    allow_download: bool = False
    track: tuple[str, ...] = ()
    allow_upload: bool = False
    gpu_index: int = 0
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    engine: str = OWN_ENGINE
    engine_python: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.setup, TrainingSetup):
            raise FieldError("setup", self.setup, "a training setup")
        validate.text("model_source", self.model_source)
        validate.text("data_path", self.data_path)
        if self.eval_data_path is not None:
            validate.text("eval_data_path", self.eval_data_path)
        validate.number("learning_rate", self.learning_rate, minimum=0.0, maximum=10.0)
        validate.number("num_train_epochs", self.num_train_epochs, minimum=1e-6, maximum=1e6)
        for name in ("max_steps", "save_steps", "eval_steps", "early_stopping_patience"):
            if getattr(self, name) is not None:
                validate.integer(name, getattr(self, name), minimum=1, maximum=10**9)
        if self.save_minutes is not None:
            validate.number("save_minutes", self.save_minutes, minimum=1e-6, maximum=1e6)
        validate.integer("keep_checkpoints", self.keep_checkpoints, minimum=2, maximum=1000)
        validate.boolean("checkpoints", self.checkpoints)
        validate.integer("logging_steps", self.logging_steps, minimum=1, maximum=10**6)
        validate.number("warmup_ratio", self.warmup_ratio, minimum=0.0, maximum=0.999)
        validate.choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        validate.number("weight_decay", self.weight_decay, minimum=0.0, maximum=10.0)
        validate.number("max_grad_norm", self.max_grad_norm, minimum=0.0, maximum=1e6)
        validate.integer("seed", self.seed, minimum=0, maximum=2**32 - 1)
        validate.integer("gpu_index", self.gpu_index, minimum=0, maximum=1023)
        check_nodes(self.setup.num_processes, self.nnodes, self.node_rank, self.rdzv_endpoint)
        validate.boolean("assistant_only_loss", self.assistant_only_loss)
        validate.boolean("allow_download", self.allow_download)
        trackers.checked(self.track)
        validate.boolean("allow_upload", self.allow_upload)
        validate.choice("engine", self.engine, ENGINES)
        if (self.engine_python is None) != (self.engine == OWN_ENGINE):
            raise FieldError("engine_python", self.engine_python, f"an interpreter for {self.engine} alone")
        check_evaluation(
            data=self.eval_data_path,
            split=self.eval_split,
            steps=self.eval_steps,
            patience=self.early_stopping_patience,
        )

    @property
    def local_processes(self) -> int:
        """Processes of this machine, a GPU each."""
        return self.setup.num_processes // self.nnodes

    @property
    def evaluates(self) -> bool:
        """Whether anything is evaluated on."""
        return self.eval_data_path is not None or self.eval_split is not None

    @property
    def saves_every_minutes(self) -> float | None:
        """Minutes from one checkpoint to the next; None where steps alone decide."""
        if self.save_minutes is None and self.save_steps is None:
            return defaults.SAVE_MINUTES
        return self.save_minutes

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the setup in its own."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "setup": self.setup.to_dict(), "schema_version": JOB_SCHEMA_VERSION}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingJob:
        """Read the JSON form.

        Raises:
            InputError: not an object, an unknown or missing key, or a value that is not accepted.
        """
        if not isinstance(values, Mapping):
            raise InputError("a training job must be a JSON object")
        rest = dict(values)
        version = rest.pop("schema_version", None)
        if version != JOB_SCHEMA_VERSION:
            raise FieldError("schema_version", version, str(JOB_SCHEMA_VERSION))
        known = [field.name for field in dataclasses.fields(cls)]
        for key in rest:
            if key not in known:
                raise FieldError("job key", key, "one of " + ", ".join(known))
        for key in ("setup", "model_source", "data_path"):
            if key not in rest:
                raise InputError(f"{key} is required in a training job")
        rest["setup"] = TrainingSetup.from_dict(rest["setup"])
        rest["track"] = trackers.checked(rest.get("track", ()))
        return cls(**rest)


def check_nodes(num_processes: int, nnodes: int, node_rank: int, rdzv_endpoint: str | None) -> None:
    """See that what is asked of several machines goes together.

    Raises:
        InputError: it does not; the option is named.
    """
    validate.integer("--nnodes", nnodes, minimum=1, maximum=1024)
    validate.integer("--node-rank", node_rank, minimum=0, maximum=nnodes - 1)
    if num_processes % nnodes:
        raise InputError(f"--num-processes {num_processes}: {nnodes} machines cannot share them evenly")
    if nnodes == 1:
        if rdzv_endpoint is not None:
            raise InputError("--rdzv-endpoint is for --nnodes of 2 or more")
        return
    host, _, port = (rdzv_endpoint or "").rpartition(":")
    if not host or not port.isdecimal():
        raise FieldError("--rdzv-endpoint", rdzv_endpoint, "host:port of the machine with --node-rank 0")


def check_evaluation(
    *, data: object | None, split: float | None, steps: int | None, patience: int | None
) -> None:
    """See that what is asked of evaluation goes together.

    Raises:
        InputError: it does not; the option is named.
    """
    if split is not None:
        validate.number("--eval-split", split, minimum=0.0, maximum=1e9)
        if split <= 0 or (split > 1 and split != int(split)):
            raise FieldError("--eval-split", split, "a share between 0 and 1, or a number of examples")
        if data is not None:
            raise InputError("--eval-split and --eval-data exclude each other: name one of them")
    for option, value in (("--eval-steps", steps), ("--early-stopping-patience", patience)):
        if value is not None and split is None and data is None:
            raise InputError(f"{option} needs something to evaluate on: --eval-data or --eval-split")
