"""Short runs of the demo model in forked trainers, and what they leave, to be compared bit by bit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launcher.runs.attempts import Attempt, add_attempt, first_attempt, read_attempts
from launcher.runs.events import Event, read_events
from launcher.runs.folder import RunFolder, create_run_folder
from launcher.runs.kept import checkpoints
from launcher.runs.training_job import TrainingJob
from planner.base.data_files import PROFILES
from planner.setup.training_setup import TrainingSetup
from tests import forks

DEMO = PROFILES / "demo"
SETUP = TrainingSetup(
    model="demo",
    max_length=64,
    method="lora",
    dtype="float32",
    per_device_train_batch_size=2,
    lora_r=4,
    gradient_checkpointing=False,
    optim="adamw_torch_fused",
)


def make_run(root: Path, *, name: str = "run", examples: int = 16, **changes: Any) -> RunFolder:
    """A run on the demo's first examples; `setup` and fields of the job as given."""
    root.mkdir(exist_ok=True)
    data = root / f"{examples}.jsonl"
    lines = (DEMO / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:examples]))
    values: dict[str, Any] = {
        "setup": SETUP,
        "model_source": str(DEMO / "model"),
        "data_path": str(data),
        "learning_rate": 4e-3,
        "num_train_epochs": 2.0,
        **changes,
    }
    return create_run_folder(root, TrainingJob(**values), name=name)


def train(run: Path, prepare: Callable[[], None] | None) -> int:
    """The training process of a run, after what a test has prepared in it; returns its exit code."""
    from launcher.training.train import main

    if prepare is not None:
        prepare()
    return main([str(run)])


def start(
    run: RunFolder,
    prepare: Callable[[], None] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start the training process; with `environment` beside its own variables."""
    given = None if environment is None else {**os.environ, **environment}
    return forks.start(train, run.path, prepare, output=run.log("trainer"), environment=given)


def code_of(trainer: BaseProcess) -> int | None:
    """Wait for a trainer, which a hang alone outlasts, and return its exit code."""
    trainer.join(3000)
    return trainer.exitcode


def trained(run: RunFolder, prepare: Callable[[], None] | None = None) -> int | None:
    """Train to the end."""
    return code_of(start(run, prepare))


def go_on(run: RunFolder, **changes: Any) -> Attempt:
    """Write the attempt that goes on from the newest whole checkpoint, with fields changed."""
    attempts = read_attempts(run.attempts) or [first_attempt(run.read_job())]
    newest = checkpoints.newest(run.checkpoints).newest
    attempt = dataclasses.replace(
        attempts[-1],
        **{
            "number": attempts[-1].number + 1,
            "reason": "resume",
            "from_step": 0 if newest is None else newest.step,
            **changes,
        },
    )
    add_attempt(run.attempts, attempt)
    return attempt


def events_of(run: RunFolder, kind: type[Event]) -> list[Any]:
    """All events of a kind."""
    return [event for event in read_events(run.events) if isinstance(event, kind)]


def differences(one: Path, other: Path) -> list[str]:
    """Names of tensors and states that differ in any bit between two folders of an adapter or checkpoint."""
    import torch
    from safetensors.torch import load_file

    found = []
    for path in sorted(one.iterdir()):
        if path.suffix == ".safetensors":
            mine, its = load_file(path), load_file(other / path.name)
            found += [name for name in mine.keys() | its.keys() if not _same(mine.get(name), its.get(name))]
        elif path.suffix in (".pt", ".pth"):
            mine, its = (_tensors(torch, folder / path.name) for folder in (one, other))
            if not _same(mine, its):
                found.append(path.name)
    return found


def _tensors(torch: Any, path: Path) -> Any:
    import numpy as np

    allowed = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, weights_only=True)


def _same(one: Any, other: Any) -> bool:
    import numpy as np
    import torch

    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
