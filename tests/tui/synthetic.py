"""Run folders made by hand, as a trainer and a sampler would leave them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from launcher.runs.events import (
    EndEvent,
    EvalEvent,
    Event,
    LogEvent,
    MemoryEvent,
    SampleEvent,
    StartEvent,
    WarningEvent,
    to_line,
)
from launcher.runs.folder import RunFolder
from launcher.runs.training_job import TrainingJob
from planner.setup.training_setup import TrainingSetup

GIB = 2**30
START = 1_760_000_000.0


def make_folder(path: Path, *, model: str = "qwen2.5-14b", data: str = "/data/train.jsonl") -> RunFolder:
    """A run folder with a job and nothing else."""
    path.mkdir(parents=True)
    job = TrainingJob(
        setup=TrainingSetup(model=model, max_length=4096, gradient_accumulation_steps=16),
        model_source="/models/qwen",
        data_path=data,
    )
    folder = RunFolder(path)
    folder.job.write_text(json.dumps(job.to_dict()))
    return folder


def append(path: Path, *events: Event) -> None:
    """Append events as their writer does."""
    with path.open("a") as file:
        for event in events:
            file.write(to_line(event))


def log(step: int, **changes: Any) -> LogEvent:
    """A log event of a run whose loss falls."""
    values: dict[str, Any] = {
        "time": START + 10 * step,
        "step": step,
        "loss": 1.2 + 1.4 * math.exp(-step / 60) + 0.12 * math.sin(step * 12.9898) * math.cos(step * 4.1414),
        "learning_rate": 1e-4 * (1 - step / 400),
        "grad_norm": 0.4 + 0.1 * math.sin(step),
        "tokens_per_second": 1480.0 + 12 * math.sin(step / 3),
        "step_seconds": 4.0,
    }
    return LogEvent(**{**values, **changes})


def memory(phase: str, step: int, gib: float | None) -> MemoryEvent:
    """A memory event of a GPU run (`gib` as the driver shows it) or, with None, of a run on the CPU."""
    if gib is None:
        return MemoryEvent(
            time=START + step,
            phase=phase,
            step=step,
            allocated_bytes=None,
            reserved_bytes=None,
            process_bytes=6 * 10**8,
        )
    return MemoryEvent(
        time=START + step,
        phase=phase,
        step=step,
        allocated_bytes=int((gib - 1.4) * GIB),
        reserved_bytes=int((gib - 0.9) * GIB),
        process_bytes=int(gib * GIB),
    )


def start(total_steps: int = 400) -> StartEvent:
    """The start of a run."""
    return StartEvent(time=START, total_steps=total_steps, environment={"torch": "2.13.0"})


def sample(second: int, **changes: Any) -> SampleEvent:
    """A GPU sample."""
    values: dict[str, Any] = {
        "time": START + second,
        "used_bytes": int((13.9 + 0.2 * math.sin(second / 5)) * GIB),
        "total_bytes": int(15.93 * GIB),
        "process_bytes": int(13.9 * GIB),
        "utilization_percent": 97.0,
        "temperature_c": 68.0,
        "power_w": 176.0,
    }
    return SampleEvent(**{**values, **changes})


def half_way(path: Path) -> RunFolder:
    """A run that stands at step 240 of 400 with evaluations, memory, samples, a warning and a log."""
    folder = make_folder(path)
    append(folder.events, start(), memory("load", 0, 10.1))
    append(
        folder.events, WarningEvent(time=START, message="3 of 1,204 examples are longer than 4,096 tokens")
    )
    for step in range(1, 241):
        append(folder.events, log(step))
        if step % 60 == 0:
            append(
                folder.events, EvalEvent(time=START + step, step=step, loss=1.25 + 1.3 * math.exp(-step / 60))
            )
    append(folder.events, memory("step", 240, 14.02), memory("evaluation", 240, 13.9))
    append(folder.samples, *(sample(second) for second in range(120)))
    folder.log("trainer").write_text(
        "loading qwen2.5-14b in 4 bits\rloading qwen2.5-14b in 4 bits: done\n"
        "trainable parameters 68,812,800 of 14,838,846,464\n"
        "longest batch first: 4,096 tokens\nevaluated at step 240: loss 1.274\n"
    )
    return folder


def end(state: str, step: int, message: str = "") -> EndEvent:
    """The end of a run."""
    return EndEvent(time=START + 10 * step, state=state, message=message, step=step)
