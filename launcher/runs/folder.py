"""The run folder: the files by which trainer, sampler and watchers know each other, and the job they run.

Light: no torch. Paths are those of the contract; a lock is held by an open file, so it ends with its holder.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from planner.base import validate
from planner.base.data_files import write_atomically
from planner.base.errors import FieldError, InputError, VramwiseError
from planner.setup import defaults
from planner.setup.training_setup import TrainingSetup

JOB_SCHEMA_VERSION = 1
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
SEED = 42
"""Of order, adapter and dropout, where none is asked for: transformers' own (TrainingArguments.seed)."""
END_STATES = ("finished", "stopped", "failed", "oom", "diverged")


class TrainerExit(IntEnum):
    """Exit codes of the training process, one for each way to end."""

    FINISHED = 0
    FAILED = 1
    BAD_INPUT = 2
    OOM = 4
    DIVERGED = 5
    STOPPED = 130


class RunBusyError(VramwiseError):
    """Another process holds the run, or the run has already been started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """What one training process does: the setup, where model and data are, and the training arguments.

    `model_source` is a folder or a Hub id; a Hub id is fetched only with `allow_download`, else it must be in
    the Hugging Face cache. `max_steps` overrides `num_train_epochs`. `warmup_ratio` is a share of all steps.
    `save_steps` and `eval_steps` are null for none. `assistant_only_loss` takes the loss on the assistant's
    turns alone and needs a chat template with generation markers. `gpu_index` counts GPUs by PCI bus id,
    within CUDA_VISIBLE_DEVICES when that is set.
    """

    setup: TrainingSetup
    model_source: str
    data_path: str
    eval_data_path: str | None = None
    learning_rate: float = defaults.LORA_LEARNING_RATE
    num_train_epochs: float = defaults.EPOCHS
    max_steps: int | None = None
    warmup_ratio: float = defaults.WARMUP_RATIO
    lr_scheduler_type: str = defaults.LR_SCHEDULER_TYPE
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = SEED
    logging_steps: int = 1
    save_steps: int | None = None
    eval_steps: int | None = None
    assistant_only_loss: bool = False
    allow_download: bool = False
    gpu_index: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.setup, TrainingSetup):
            raise FieldError("setup", self.setup, "a training setup")
        validate.text("model_source", self.model_source)
        validate.text("data_path", self.data_path)
        if self.eval_data_path is not None:
            validate.text("eval_data_path", self.eval_data_path)
        validate.number("learning_rate", self.learning_rate, minimum=0.0, maximum=10.0)
        validate.number("num_train_epochs", self.num_train_epochs, minimum=1e-6, maximum=1e6)
        for name in ("max_steps", "save_steps", "eval_steps"):
            if getattr(self, name) is not None:
                validate.integer(name, getattr(self, name), minimum=1, maximum=10**9)
        validate.integer("logging_steps", self.logging_steps, minimum=1, maximum=10**6)
        validate.number("warmup_ratio", self.warmup_ratio, minimum=0.0, maximum=0.999)
        validate.choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        validate.number("weight_decay", self.weight_decay, minimum=0.0, maximum=10.0)
        validate.number("max_grad_norm", self.max_grad_norm, minimum=0.0, maximum=1e6)
        validate.integer("seed", self.seed, minimum=0, maximum=2**32 - 1)
        validate.integer("gpu_index", self.gpu_index, minimum=0, maximum=1023)
        validate.boolean("assistant_only_loss", self.assistant_only_loss)
        validate.boolean("allow_download", self.allow_download)
        if self.eval_steps is not None and self.eval_data_path is None:
            raise InputError("eval_steps needs eval_data_path")

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
        return cls(**rest)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def job(self) -> Path:
        """TrainingJob as JSON."""
        return self.path / "job.json"

    @property
    def plan(self) -> Path:
        """The Plan as JSON; absent for a job made by hand."""
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        """The trainer's events, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        """The sampler's samples, one JSON object a line."""
        return self.path / "samples.jsonl"

    @property
    def stop(self) -> Path:
        """Its presence asks the trainer to stop after the current step."""
        return self.path / "stop"

    @property
    def adapter(self) -> Path:
        """The trained adapter, or the trained model of a full fine-tuning; appears whole or not at all."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Trainer checkpoints, when the job saves any."""
        return self.path / "checkpoints"

    @property
    def record(self) -> Path:
        """The RunRecord as JSON."""
        return self.path / "record.json"

    def log(self, process: str) -> Path:
        """Output of a process ("trainer" or "sampler")."""
        return self.path / f"{process}.log"

    def identity(self, process: str) -> Path:
        """pid and creation time of a process."""
        return self.path / f"{process}.json"

    def lock_file(self, holder: str) -> Path:
        """File whose lock says that `holder` is alive."""
        return self.path / f".{holder}.lock"

    def read_job(self) -> TrainingJob:
        """Read job.json.

        Raises:
            InputError: it is absent or not a training job.
        """
        try:
            values = json.loads(self.job.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.job}: not a readable training job ({error})") from error
        return TrainingJob.from_dict(values)


def create_run_folder(root: Path, job: TrainingJob, *, name: str | None = None) -> RunFolder:
    """Make a folder of its own under `root` and write job.json into it.

    The name is made of the time and the model unless given; a given name that exists is refused.

    Raises:
        InputError: the folder exists or cannot be made.
    """
    label = re.sub(r"[^a-z0-9.]+", "-", Path(job.setup.model).name.lower()).strip("-.") or "model"
    stem = name or f"{time.strftime('%Y%m%d-%H%M%S')}-{label[:40]}"
    for attempt in range(1000):
        path = root / (stem if attempt == 0 else f"{stem}-{attempt + 1}")
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            if name is not None:
                raise InputError(f"{path}: the run folder exists already") from error
            continue
        except OSError as error:
            raise InputError(f"{path}: the run folder cannot be made ({error.strerror})") from error
        folder = RunFolder(path.resolve())
        write_atomically(folder.job, json.dumps(job.to_dict(), indent=2) + "\n")
        return folder
    raise InputError(f"{root}: no free name for a run folder")


@contextmanager
def hold_lock(folder: RunFolder, holder: str) -> Iterator[None]:
    """Hold the run's lock of `holder` ("trainer", "sampler", "launcher"); the kernel frees it when we die.

    Raises:
        RunBusyError: another process holds it.
    """
    path = folder.lock_file(holder)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise RunBusyError(f"{folder.path}: another {holder} holds this run (pid {owner})") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)
