"""What is to be merged: a run or adapter folders, how they were trained, and where the result goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.merging.adapter_folder import CONFIG, AdapterFolder, read_adapter
from launcher.runs.folder import RunFolder, default_root
from launcher.runs.kept import checkpoints
from launcher.runs.training_job import TrainingJob
from launcher.training.loading.base_folder import BaseFolder
from planner.base.errors import FieldError, InputError
from planner.setup.methods import stored_knobs
from planner.setup.training_setup import TrainingSetup

DEQUANTISED, ORIGINAL = "dequantised", "original"
KINDS = (DEQUANTISED, ORIGINAL)
"""Which weights the adapter is added to: what it was trained on, in 4 bits and back, or the base's own."""
MEASURED_LENGTH = 1024
"""Tokens at which examples are cut where no run says how long they were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeWish:
    """What a person asks for; null stands for what the run says.

    `folder` is a run or an adapter, `adapters` more adapters of the same base, `weights` one factor for each
    of them all, `model` where the base is, `base` one of KINDS, `data` the examples to measure on, and
    `measured` whether it is measured at all.
    """

    folder: Path
    output: Path | None = None
    model: str | None = None
    adapters: tuple[Path, ...] = ()
    weights: tuple[float, ...] = ()
    base: str | None = None
    data: Path | None = None
    measured: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeTask:
    """A merge as it is going to be done, nothing left open.

    `source` is the base's folder or Hub id, `setup` how the adapter was trained, `kinds` the bases that are
    tried, `data` the examples that they are measured on, or null.
    """

    adapters: tuple[AdapterFolder, ...]
    weights: tuple[float, ...]
    source: str
    setup: TrainingSetup
    kinds: tuple[str, ...]
    data: Path | None
    assistant_only_loss: bool
    output: Path

    @property
    def quantized(self) -> bool:
        """Whether the adapter was trained on a base in 4 bits."""
        return self.setup.method == "qlora"

    @property
    def dtype(self) -> str:
        """The dtype of the result, one of 16 bits."""
        return "float16" if self.setup.dtype == "float16" else "bfloat16"


def read_task(wish: MergeWish) -> MergeTask:
    """Read what a wish names.

    Raises:
        InputError: there is no adapter, nothing to merge, or something that only a person can know.
    """
    run, path = _run_and_adapter(wish.folder)
    job = None if run is None else run.read_job()
    if job is not None and run is not None and not job.setup.uses_lora:
        raise InputError(
            f"{wish.folder}: nothing to merge: the run trained all weights, {run.adapter} is the model"
        )
    if run is not None and path == run.adapter and not path.is_dir():
        raise InputError(f"{wish.folder}: this run has no adapter yet{_checkpoints(run)}")
    adapters = tuple(read_adapter(one) for one in (path, *wish.adapters))
    weights = _weights(wish.weights, adapters)
    if len(adapters) > 1 and any(one.config.use_dora for one in adapters):
        raise InputError(
            "several adapters are added up, which DoRA's magnitudes do not allow: merge one at a time"
        )
    source = wish.model or (job.model_source if job is not None else adapters[0].base)
    if not source:
        raise InputError(f"{path}: {CONFIG} names no base model: give it with --model")
    setup = _setup(job, wish, source, path)
    kinds = _kinds(setup, wish)
    output = _output(wish, run, path)
    if output.exists():
        raise InputError(f"{output} exists already; -o names another folder")
    return MergeTask(
        adapters=adapters,
        weights=weights,
        source=source,
        setup=setup,
        kinds=kinds,
        data=_data(job, wish) if wish.measured else None,
        assistant_only_loss=job is not None and job.assistant_only_loss,
        output=output,
    )


def _run_and_adapter(folder: Path) -> tuple[RunFolder | None, Path]:
    """The run that a folder is, or is part of, and the adapter's folder."""
    path = folder.expanduser().resolve()
    named = default_root() / folder
    if not path.is_dir() and RunFolder(named).job.is_file():
        path = named
    if not path.is_dir():
        raise InputError(f"{folder}: no such folder, and no such run in {default_root()}")
    for place in (path, *list(path.parents)[:2]):
        run = RunFolder(place)
        if run.job.is_file():
            return run, run.adapter if place == path else path
    return None, path


def _checkpoints(run: RunFolder) -> str:
    found = [checkpoints.path_of(run.checkpoints, step) for step in checkpoints.steps(run.checkpoints)]
    usable = [path for path in found if (path / CONFIG).is_file()]
    return f"; {usable[-1]} can be merged" if usable else ""


def _weights(given: Sequence[float], adapters: Sequence[AdapterFolder]) -> tuple[float, ...]:
    if not given:
        return (1.0,) * len(adapters)
    if len(given) != len(adapters):
        raise InputError(
            f"--weight: {len(given)} given for {len(adapters)} adapters; give one for each, in order"
        )
    for value in given:
        if not math.isfinite(value) or value == 0:
            raise FieldError("--weight", value, "a number other than 0")
    return tuple(given)


def _setup(job: TrainingJob | None, wish: MergeWish, source: str, path: Path) -> TrainingSetup:
    if job is not None:
        return job.setup
    if wish.base is None:
        raise InputError(
            f"{path}: no run tells whether it was trained on a base in 4 bits (QLoRA) or in 16: give "
            f"--base {DEQUANTISED} for the one, --base {ORIGINAL} for the other"
        )
    method = "qlora" if wish.base == DEQUANTISED else "lora"
    return TrainingSetup(model=source, max_length=MEASURED_LENGTH, method=method)


def _kinds(setup: TrainingSetup, wish: MergeWish) -> tuple[str, ...]:
    if setup.method != "qlora":
        if wish.base == DEQUANTISED:
            raise InputError(
                f"--base {DEQUANTISED}: this run's base was in 16 bits, so there is one way to merge"
            )
        return (ORIGINAL,)
    if wish.base is not None:
        return (wish.base,)
    if not wish.measured:
        raise InputError(
            f"--no-measure needs --base {DEQUANTISED} or --base {ORIGINAL}: nothing would choose"
        )
    return KINDS


def _output(wish: MergeWish, run: RunFolder | None, path: Path) -> Path:
    if wish.output is not None:
        return wish.output.expanduser().resolve()
    if run is None:
        return path.parent / f"{path.name}-merged"
    return run.path / ("merged" if path == run.adapter else f"merged-{path.name}")


def _data(job: TrainingJob | None, wish: MergeWish) -> Path:
    """The examples to measure on: given, else those that the run was evaluated on, else those it learned."""
    if wish.data is not None:
        return wish.data
    if job is None:
        raise InputError("no run tells the examples to measure on: give --data FILE, or --no-measure")
    path = Path(job.eval_data_path or job.data_path)
    if not path.exists():
        raise InputError(
            f"the run's examples are not in {path} any more: --data FILE names others, "
            "--no-measure does without"
        )
    return path


def for_base(task: MergeTask, base: BaseFolder) -> MergeTask:
    """The task with the kinds of bases that a folder has.

    Raises:
        InputError: the original is asked for, and the folder's weights are quantised.
    """
    if base.checkpoint is None:
        return task
    if DEQUANTISED not in task.kinds:
        raise InputError(
            f"{base.name} is stored in {base.checkpoint.bits} bits: --model names the 16-bit model that it "
            f"was made from, or --base {DEQUANTISED} merges into what it stands for"
        )
    # Where no run says how it was trained, the folder does.
    setup = task.setup.replace(**stored_knobs(base.checkpoint))
    return replace(task, kinds=(DEQUANTISED,), setup=setup)
