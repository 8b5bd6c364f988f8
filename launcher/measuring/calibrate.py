"""Choose what to measure on a GPU, measure it in child processes, and fit the coefficients.

Light: no torch. Records are appended as they come, so an interrupted calibration goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.measuring.profile import Profile, profile_line
from launcher.runs.allocator import measuring_environment
from planner.base.data_files import user_data_dir, write_atomically
from planner.base.errors import InputError, VramwiseError
from planner.calibration.memory_fit import Calibration, calibrate
from planner.calibration.records import RunRecord, all_records, read_records
from planner.calibration.speed_fit import SpeedFit, TooFewRunsError, fit_rates, start_for
from planner.gpus.detect import LocalGpu
from planner.memory import estimate_memory
from planner.memory.measured.files import coefficients_name
from planner.models.catalog import load_shipped
from planner.setup.cuda_allocator import machine_allocator
from planner.setup.run import TrainingRun
from planner.setup.training_setup import TrainingSetup
from planner.throughput.microbenchmarks import forget_microbenchmarks, own_file

FILL = 0.9
"""Share of the free memory that a calibration run may be expected to need at most."""
START_SECONDS = 30.0
"""About what a child takes to import the stack and start CUDA; not counted against the runs."""
KERNEL_SECONDS, LEAST_KERNEL_SECONDS = 40.0, 10.0
"""What the microbenchmarks may take beside their child's start, and what they need for the first of each."""
KERNEL_SHARE = 0.5
"""Share of the minutes given that they may take, their start included."""


class ChildError(VramwiseError):
    """A measuring process died."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a calibration says while it runs: `text` for the person, how many of `total` have ended."""

    ended: int
    total: int
    text: str


def _setup(model: str, length: int, batch: int = 1, **knobs: object) -> TrainingSetup:
    return TrainingSetup.from_dict(
        {"model": model, "max_length": length, "per_device_train_batch_size": batch, **knobs}
    )


# In the order of what they tell: the first of each child has the driver's figure to itself, so the context
# is measured without and with a paged optimizer; the rest spread over sizes, methods and checkpointing.
UNPAGED = (
    Profile(setup=_setup("qwen2.5-0.5b", 1024, 4, optim="adamw_torch_fused")),
    Profile(setup=_setup("qwen3-1.7b", 2048, 1, method="lora", optim="adamw_torch_fused")),
    Profile(setup=_setup("qwen2.5-0.5b", 1024, 2, method="full", optim="adamw_8bit")),
    Profile(setup=_setup("llama-3.2-1b", 1024, 4, optim="adamw_8bit", gradient_checkpointing=False)),
    Profile(setup=_setup("llama-3.2-3b", 2048, 2, optim="adamw_8bit", lora_dropout=0.05)),
)
PAGED = (
    Profile(setup=_setup("llama-3.2-1b", 2048, 2)),
    Profile(setup=_setup("llama-3.1-8b", 2048)),
    Profile(setup=_setup("qwen2.5-3b", 4096)),
    Profile(setup=_setup("qwen2.5-14b", 2048)),
    Profile(setup=_setup("gemma-3-4b", 2048)),
    Profile(setup=_setup("phi-4", 4096)),
    Profile(setup=_setup("qwen3-8b", 4096, 2, lora_r=64)),
    Profile(setup=_setup("mistral-nemo-12b", 2048, 2)),
    Profile(setup=_setup("qwen2.5-32b", 2048)),
    Profile(setup=_setup("llama-3.1-70b", 1024)),
)


def choose(gpu: LocalGpu, done: Sequence[RunRecord]) -> tuple[tuple[Profile, ...], tuple[Profile, ...]]:
    """Profiles for this GPU's free memory that no record of it has yet, by child process."""
    allocator = machine_allocator()
    known = {
        record.setup
        for record in done
        if record.environment.gpu_id == gpu.spec.id and record.allocator == allocator
    }
    limit = FILL * gpu.free_bytes

    def wanted(profile: Profile) -> bool:
        model = load_shipped(profile.setup.model)
        run = TrainingRun(setup=profile.setup, model=model)
        need = estimate_memory(run, gpu=gpu.spec, allocator=allocator)
        return need.peak_upper_bytes <= limit and profile.setup not in known

    return tuple(filter(wanted, UNPAGED)), tuple(filter(wanted, PAGED))


def records_file(gpu: LocalGpu) -> Path:
    """Where this GPU's own calibration runs are kept."""
    return user_data_dir() / "runs" / f"calibrate-{gpu.spec.id}.jsonl"


def coefficients_file(gpu: LocalGpu) -> Path:
    """Where this GPU's own coefficients are kept."""
    return user_data_dir() / "calibration" / coefficients_name(gpu.spec.id, machine_allocator())


def measure(gpu: LocalGpu, minutes: float, report: Callable[[Progress], None], *, again: bool = False) -> int:
    """Measure within the minutes given: microbenchmarks, then runs; returns how many runs were recorded.

    Raises:
        InputError: nothing fits the free memory.
        ChildError: a process that measures runs died.
    """
    path = records_file(gpu)
    done = tuple(read_records(path)) if path.exists() and not again else ()
    children = [profiles for profiles in choose(gpu, done) if profiles]
    total = sum(len(profiles) for profiles in children)
    if not total and not done:
        raise InputError(f"{gpu.spec.id}: {gpu.free_bytes:,} free bytes are too few for any calibration run")
    end = time.monotonic() + 60.0 * minutes
    if again or not own_file(gpu.spec.id).exists():
        _measure_kernels(gpu, 60.0 * minutes * KERNEL_SHARE, report, total)
    recorded = ended = 0
    for index, profiles in enumerate(children):
        share = (end - time.monotonic()) / (len(children) - index) - START_SECONDS
        if share <= 0:
            break
        recorded += _run_child(gpu, profiles, path, share, _Reporter(report, ended, total, profiles))
        ended += len(profiles)
    return recorded


def fit(gpu: LocalGpu) -> Calibration:
    """Fit the coefficients of this GPU to every record of it, shipped or own, and keep them.

    Raises:
        InputError: too few records.
    """
    name = f"{gpu.spec.id}, calibrated here"
    found = calibrate(all_records(), gpu.spec, load_shipped, name=name, allocator=machine_allocator())
    write_atomically(coefficients_file(gpu), json.dumps(found.coefficients.to_dict(), indent=1) + "\n")
    return found


def rates_file(gpu: LocalGpu) -> Path:
    """Where this GPU's own throughput rates are kept."""
    return user_data_dir() / "calibration" / "throughput" / f"{gpu.spec.id}.json"


def fit_speed(gpu: LocalGpu) -> SpeedFit | None:
    """Fit this GPU's throughput rates to every record of it, and keep them; None with too few runs."""
    forget_microbenchmarks()
    try:
        found = fit_rates(all_records(), gpu.spec.id, load_shipped, start=start_for(gpu.spec))
    except TooFewRunsError:
        return None
    write_atomically(rates_file(gpu), json.dumps(found.rates.to_dict(), indent=1) + "\n")
    return found


@dataclass(slots=True)
class _Reporter:
    report: Callable[[Progress], None]
    before: int
    total: int
    profiles: tuple[Profile, ...]

    def say(self, line: str) -> bool:
        """Pass on a child's line; returns whether it was a record."""
        said = _json_object(line)
        index = said.get("index")
        if not isinstance(index, int) or not 0 <= index < len(self.profiles):
            return False
        setup = self.profiles[index].setup
        what = f"{setup.model} {setup.method} {setup.max_length} x {setup.per_device_train_batch_size}"
        if said["event"] == "started":
            self.report(
                Progress(ended=self.before + said["index"], total=self.total, text=f"measuring {what}")
            )
            return False
        text = f"{what}: {said['outcome']}"
        self.report(Progress(ended=self.before + said["index"] + 1, total=self.total, text=text))
        return bool(said["outcome"] != "refused")


def _measure_kernels(gpu: LocalGpu, seconds: float, report: Callable[[Progress], None], total: int) -> None:
    """Measure single kernels in a child process; where it fails, say so and go on: runs tell more."""
    seconds = min(KERNEL_SECONDS, seconds - START_SECONDS)
    if seconds < LEAST_KERNEL_SECONDS:
        report(Progress(ended=0, total=total, text="too little time for microbenchmarks"))
        return

    def hear(line: str) -> None:
        said = _json_object(line)
        if said.get("event") == "microbenchmark":
            report(Progress(ended=0, total=total, text=f"microbenchmarks: {said.get('what')}"))

    command = [
        "launcher.measuring.microbench",
        "--output",
        str(own_file(gpu.spec.id)),
        "--seconds",
        str(seconds),
    ]
    try:
        _follow_child(gpu, command, hear)
    except ChildError as error:
        report(Progress(ended=0, total=total, text=f"no microbenchmarks: {error}"))
    forget_microbenchmarks()


def _json_object(line: str) -> dict[str, Any]:
    """A line's JSON object; an empty one for what libraries print where the child speaks."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _run_child(
    gpu: LocalGpu, profiles: tuple[Profile, ...], output: Path, seconds: float, reporter: _Reporter
) -> int:
    recorded = 0

    def hear(line: str) -> None:
        nonlocal recorded
        recorded += reporter.say(line)

    with tempfile.TemporaryDirectory(prefix="vramwise-") as folder:
        wanted = Path(folder) / "profiles.jsonl"
        wanted.write_text("".join(profile_line(profile) + "\n" for profile in profiles), encoding="utf-8")
        _follow_child(gpu, ["launcher.measuring.profiler", str(wanted), str(output), str(seconds)], hear)
    return recorded


def _follow_child(gpu: LocalGpu, module: Sequence[str], hear: Callable[[str], None]) -> None:
    """Run a module in a process of its own on that GPU, and pass on each line that it prints.

    Raises:
        ChildError: it ended with another code than 0.
    """
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", *module]
        child = subprocess.Popen(  # noqa: S603  our own interpreter and module
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(gpu)
        )
        try:
            for line in child.stdout or ():
                hear(line)
            code = child.wait()
        finally:
            # Ctrl-C, or an error here, must not leave a process on the GPU.
            if child.poll() is None:
                child.kill()
                child.wait()
        if code != 0:
            errors.seek(0)
            lines = errors.read().decode("utf-8", errors="replace").strip().splitlines() or ["no message"]
            raise ChildError(f"the measuring process ended with code {code}: {lines[-1][:200]}")


def _environment(gpu: LocalGpu) -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {
        **measuring_environment(os.environ),
        "PYTHONPATH": path,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": gpu.uuid,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
