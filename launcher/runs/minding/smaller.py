"""`python -m launcher.runs.minding.smaller RUN_DIR STEP [ROOM_BYTES]`: the attempt that needs less, as JSON.

A process of its own, which the keeper waits for: planning reads catalogs and may describe a model, and the
keeper is to hold nothing that can break it. `null` says that there is no smaller one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.runs.attempts import Attempt, read_attempts
from launcher.runs.events import StartEvent, iter_events
from launcher.runs.folder import RunFolder
from planner.base.errors import ExitCode, InputError, MissingExtraError, VramwiseError

if TYPE_CHECKING:
    from planner.answers.plan import Plan
    from planner.models.spec import ModelSpec

OOM_RESTARTS = 2
"""Restarts with a smaller setup, after which the run is given up."""
TIMEOUT_SECONDS = 180
"""A plan takes a second; describing a model outside the catalog may take two minutes."""


def ask_for_smaller(folder: RunFolder, *, from_step: int, room_bytes: int | None) -> Attempt | None:
    """The attempt that goes on from `from_step` with less memory, worked out in a child process.

    `room_bytes` is what other processes leave of the GPU, where that is known. None: the run has been made
    smaller often enough, nothing smaller learns the same, or it cannot be worked out.
    """
    attempts = read_attempts(folder.attempts)
    if sum(attempt.reason == "oom" for attempt in attempts) >= OOM_RESTARTS:
        return None
    command = [sys.executable, "-P", "-m", "launcher.runs.minding.smaller"]
    try:
        child = subprocess.run(  # noqa: S603 (our own interpreter and module, no shell)
            [*command, str(folder.shown), str(from_step), *([] if room_bytes is None else [str(room_bytes)])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        values = json.loads(child.stdout)
    except (subprocess.TimeoutExpired, OSError, ValueError):
        return None
    return None if values is None else Attempt.from_dict(values)


def smaller_attempt(folder: RunFolder, *, from_step: int, room_bytes: int | None) -> Attempt | None:
    """The same, worked out here; None too for a job made by hand, whose card nobody knows.

    Raises:
        VramwiseError: plan, attempts or model cannot be read.
    """
    from launcher.runs.record import read_plan
    from planner.planning.step_down import CPU_KEEPS, step_down

    plan, attempts = read_plan(folder), read_attempts(folder.attempts)
    if plan is None or not attempts:
        return None
    last = attempts[-1]
    found = step_down(
        last.setup,
        model_of(folder, plan),
        plan.gpu.spec,
        usable_bytes=plan.gpu.usable_bytes if room_bytes is None else min(plan.gpu.usable_bytes, room_bytes),
        keep=() if _on_gpu(folder, plan) else CPU_KEEPS,
    )
    if found is None:
        return None
    return Attempt(
        number=last.number + 1,
        reason="oom",
        from_step=from_step,
        setup=found.setup,
        num_train_epochs=last.num_train_epochs,
        max_steps=last.max_steps,
        changes=found.changes,
    )


def model_of(folder: RunFolder, plan: Plan) -> ModelSpec:
    """The model of a run, by its plan's name for it, else described from where its weights are.

    Raises:
        InputError: it is not known, and cannot be described.
    """
    from planner.models.catalog import resolve_model
    from planner.models.inspectors import installed_inspector

    try:
        return resolve_model(plan.model.id)
    except (InputError, MissingExtraError):  # no such name any more, or a folder's, which has to be described
        return resolve_model(folder.read_job().model_source, inspector=installed_inspector)


def _on_gpu(folder: RunFolder, plan: Plan) -> bool:
    """Whether the run is on a GPU: planned for one of this machine, or its trainer said so."""
    if plan.gpu.index is not None:
        return True
    start = next((event for event in iter_events(folder.events) if isinstance(event, StartEvent)), None)
    return start is not None and start.environment.get("device") != "cpu"


def main(arguments: list[str]) -> int:
    """Print the attempt; returns the exit code."""
    folder, step = RunFolder(Path(arguments[0])), int(arguments[1])
    room = int(arguments[2]) if len(arguments) > 2 else None
    try:
        attempt = smaller_attempt(folder, from_step=step, room_bytes=room)
    except VramwiseError as error:
        print(error, file=sys.stderr)
        return ExitCode.FAILED
    print(json.dumps(None if attempt is None else attempt.to_dict()))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
