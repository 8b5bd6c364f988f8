"""Random kills, each followed by a resumption: `python -m benchmarks.kills [KILLS] [SEED]`.

Runs of the demo model are killed with SIGKILL at random moments and at random file operations of their saves:
the trainer, or all of the run's processes. After each kill the newest whole checkpoint must be at least the
last that the run told of, no folder named as a checkpoint may be partial, and the run must go on from there.
What a run ends with is compared bit by bit with a run that nobody killed.
Writes benchmarks/results/kills.json after each run, and goes on from there when it is started again with the
same seed on the same launcher.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, write_result
from launcher.runs import sampler, supervisor
from launcher.runs.attempts import add_attempt, read_attempts
from launcher.runs.events import CheckpointEvent, LogEvent
from launcher.runs.folder import RunFolder
from launcher.runs.kept import checkpoints, fingerprint, resumption
from tests import forks
from tests.faults import kill_points
from tests.faults.small_runs import SETUP, code_of, differences, events_of, make_run, start, trained

KILLS = 200
PROJECT = Path(__file__).resolve().parents[1]
EXAMPLES, EPOCHS, SAVE_STEPS = 9, 2.0, 2
"""Ten steps of two examples, the last of each epoch of one; a checkpoint every other step and at the end."""
STEPS = 10
LOADING = 0.3
"""Share of a life in which the first step is not done."""
RUN: dict[str, Any] = {
    "examples": EXAMPLES,
    "num_train_epochs": EPOCHS,
    "save_steps": SAVE_STEPS,
    "setup": SETUP.replace(lora_dropout=0.1),
}
TARGETS = {"trainer": 12, "trainer and sampler": 4, "sampler": 1}
"""Who is killed, and how often; most deaths of a trainer alone are at a file operation."""
AT_A_FILE = 0.7


@dataclass(slots=True)
class Tally:
    """What came of the kills; `trainers_killed` does not count those of a sampler alone, `life_seconds` is
    the shortest life of a run that nobody killed. As JSON it is the benchmark's result, and goes on from it.
    """

    seed: int
    launcher_sha256: str
    trainers_killed: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    killed_amid: Counter[str] = field(default_factory=Counter)
    resumed_from_a_checkpoint: int = 0
    begun_anew_without_one: int = 0
    partial_folders_named_as_checkpoints: list[str] = field(default_factory=list)
    checkpoints_told_and_not_there: int = 0
    steps_done_again: Counter[str] = field(default_factory=Counter)
    runs_finished: int = 0
    bit_identical_to_the_uninterrupted_run: int = 0
    different: list[str] = field(default_factory=list)
    seconds: float = 0
    life_seconds: float | None = None

    @property
    def is_clean(self) -> bool:
        """Whether all went on, and ended as it should."""
        identical = self.bit_identical_to_the_uninterrupted_run
        return identical == self.runs_finished and not self.partial_folders_named_as_checkpoints


def kill_runs(root: Path, kills: int, tally: Tally, done: Callable[[Tally], None]) -> None:
    """Kill runs below `root` until `tally` has that many kills; `done` is told of each run that has ended."""
    begun = time.monotonic()
    whole = make_run(root, name="whole", **RUN)
    assert trained(whole, functools.partial(kill_points.dies_at, 0)) == 0
    tally.life_seconds = min(tally.life_seconds or math.inf, time.monotonic() - begun)
    operations = whole.log("trainer").read_text().count("operation ")
    while tally.trainers_killed < kills:
        number = tally.runs_finished + 1
        chance = random.Random(f"{tally.seed} {number}")
        run = make_run(root, name=f"run-{number}", **RUN)
        while not _live(run, chance, tally, operations if tally.trainers_killed < kills else 0):
            _resume(run, tally)
        _compare(run, whole, tally)
        shutil.rmtree(run.path)
        begun, seconds = time.monotonic(), time.monotonic() - begun
        tally.seconds = round(tally.seconds + seconds)
        done(tally)


def _live(run: RunFolder, chance: random.Random, tally: Tally, operations: int) -> bool:
    """One life of a run, killed if there are `operations` to kill it at; whether it came to its end."""
    if not operations:
        return _ended(code_of(start(run)), run)
    target = chance.choices(list(TARGETS), weights=list(TARGETS.values()))[0]
    at_a_file = target == "trainer" and chance.random() < AT_A_FILE
    left = 1 - max(checkpoints.steps(run.checkpoints), default=0) / STEPS
    operation = chance.randint(1, max(1, round(operations * left)))
    point = functools.partial(kill_points.dies_at, operation) if at_a_file else None
    begun, life = time.monotonic(), tally.life_seconds or 0.0
    trainer = start(run, point)
    watcher = forks.start(_sample, run.path, output=run.log("sampler"))
    if not at_a_file:
        trainer.join(chance.uniform(0, life * max(left, LOADING)))
        if "trainer" in target:
            _kill(trainer)
        if "sampler" in target:
            _kill(watcher)
    code = code_of(trainer)
    if code == 0 and left == 1:
        tally.life_seconds = min(life, time.monotonic() - begun)
    watcher.join(60)
    if target == "sampler":
        tally.killed[target] += 1
    if code == -signal.SIGKILL:
        tally.trainers_killed += 1
        tally.killed[target] += 1
        tally.killed_amid[_moment(run)] += 1
    return _ended(code, run)


def _ended(code: int | None, run: RunFolder) -> bool:
    assert code in (0, -signal.SIGKILL), run.log("trainer").read_text()[-2000:]
    # Killed after its last word it is at its end, too.
    return code == 0 or supervisor.status(run.path).state == "finished"


def _sample(run: Path) -> int:
    return sampler.main([str(run)])


def _kill(process: BaseProcess) -> None:
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)


def _moment(run: RunFolder) -> str:
    """What the trainer was about when it was killed, by what it has left."""
    if any((run.checkpoints / name).exists() for name in (".saving", ".removed")):
        return "a checkpoint's save"
    if run.partial_adapter.exists():
        return "the adapter's save"
    return "training" if events_of(run, LogEvent) else "loading"


def _resume(run: RunFolder, tally: Tally) -> None:
    """Go on as `vramwise runs resume` does, in a forked trainer."""
    if not read_attempts(run.attempts):
        # Killed before it had begun, and started here by nobody who would have said so.
        tally.begun_anew_without_one += 1
        return
    plan = resumption.prepare(run, resumption.ResumeWish())
    tally.partial_folders_named_as_checkpoints += plan.broken
    told = max((event.step for event in events_of(run, CheckpointEvent)), default=0)
    done = max((event.step for event in events_of(run, LogEvent)), default=0)
    tally.checkpoints_told_and_not_there += plan.attempt.from_step < told
    tally.steps_done_again[str(max(0, done - plan.attempt.from_step))] += 1
    tally.resumed_from_a_checkpoint += plan.attempt.from_step > 0
    tally.begun_anew_without_one += plan.attempt.from_step == 0
    fingerprint.write(run, plan.fingerprint)
    add_attempt(run.attempts, plan.attempt)


def _compare(run: RunFolder, whole: RunFolder, tally: Tally) -> None:
    tally.runs_finished += 1
    last = checkpoints.steps(whole.checkpoints)[-1]
    states = [checkpoints.path_of(one.checkpoints, last) for one in (whole, run)]
    different = [*differences(whole.adapter, run.adapter), *differences(*states)]
    partial = [path.name for path in run.path.rglob(".*") if path.name in (".saving", ".removed")]
    tally.bit_identical_to_the_uninterrupted_run += not different and not partial
    tally.different += [f"{run.path.name}: {name}" for name in (*different, *partial)]


def result(tally: Tally) -> dict[str, Any]:
    """The benchmark's JSON."""
    return {
        "what": "SIGKILL at random moments and at random file operations of saves, and resumptions",
        "run": f"demo model, {EXAMPLES} examples, {EPOCHS:g} epochs, dropout, saved every {SAVE_STEPS} steps",
        **{
            field.name: dict(sorted(value.items())) if isinstance(value, Counter) else value
            for field in fields(Tally)
            for value in [getattr(tally, field.name)]
        },
    }


def begun_tally(path: Path, seed: int) -> Tally:
    """What was counted before with this seed on this launcher; else nothing yet."""
    fresh = Tally(seed=seed, launcher_sha256=_launcher_digest())
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return fresh
    if (values["seed"], values.get("launcher_sha256")) != (seed, fresh.launcher_sha256):
        return fresh
    for one in fields(Tally):
        value = values[one.name]
        setattr(fresh, one.name, Counter(value) if isinstance(value, dict) else value)
    return fresh


def _launcher_digest() -> str:
    """Of all modules that a run consists of."""
    digest = hashlib.sha256()
    for folder in ("runs", "training"):
        for path in sorted((PROJECT / "launcher" / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _tell(tally: Tally) -> None:
    write_result("kills", result(tally))
    print(f"{tally.trainers_killed} kills, {tally.runs_finished} runs finished", flush=True)


def main(arguments: list[str]) -> int:
    """Run the benchmark, and write its result."""
    kills = int(arguments[0]) if arguments else KILLS
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    tally = begun_tally(FOLDER / "kills.json", seed)
    with tempfile.TemporaryDirectory() as folder:
        kill_runs(Path(folder), kills, tally, _tell)
    return 0 if tally.is_clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
