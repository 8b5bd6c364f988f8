"""Record what torch's allocator hands out and takes back in one training step of small models, on a GPU.

    python -m tests.stack.record_traces CASES.jsonl FOLDER

A case is a JSON object: `name`, `config` (a transformers config as JSON), the keys of TrainingSetup but the
model, `padded`. Each gives FOLDER/<name>.json.gz: {"about", "setup", "events", "peak", "head"}, an event
being the bytes of a block handed out, or -1-n where the n-th block was freed, `peak` and `head` what
tests/stack/attribution.py makes of the Python frames that asked for each block; and
FOLDER/<name>.frames.json.gz, those frames, to read but not to keep. Liger's kernels patch whole modules of
transformers, so their cases belong in a process of their own.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainerCallback

from launcher.measuring.measured_data import random_rows, token_dataset
from launcher.measuring.measured_run import _quiet, _tokenizer
from launcher.measuring.profile import Profile
from launcher.measuring.profiler import Profiler
from launcher.measuring.random_weights import build_random_model
from launcher.models.inspect import inspect_config
from launcher.runs import stack
from launcher.runs.training_job import TrainingJob
from launcher.training import build
from planner.base.units import DTYPE_WIDTH
from planner.setup.training_setup import TrainingSetup

from .attribution import head_span, peak_of

STEPS = 4
MAX_EVENTS = 2_000_000


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Records the last step."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        if state.global_step == STEPS - 1:
            torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=MAX_EVENTS)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        if state.global_step == STEPS:
            self.history = torch.cuda.memory._snapshot()["device_traces"][0]
            torch.cuda.memory._record_memory_history(enabled=None)


def events_of(history: list[dict[str, Any]]) -> tuple[list[int], list[list[str]], list[int]]:
    """Events, the distinct stacks of frames, and for each block handed out the number of its stack.

    Blocks that were there before the recording are left out.
    """
    numbers: dict[int, int] = {}
    events: list[int] = []
    stacks: dict[tuple[str, ...], int] = {}
    origins: list[int] = []
    for entry in history:
        if entry["action"] == "alloc":
            numbers[entry["addr"]] = len(origins)
            events.append(entry["size"])
            frames = tuple(
                f"{frame['filename'].split('-packages/')[-1]}:{frame['line']}:{frame['name']}"
                for frame in entry.get("frames", [])[:6]
            )
            origins.append(stacks.setdefault(frames, len(stacks)))
        elif entry["action"] == "free_completed" and entry["addr"] in numbers:
            events.append(-1 - numbers.pop(entry["addr"]))
    return events, [list(stack) for stack in stacks], origins


def record(case: dict[str, Any], folder: Path) -> None:
    """Train a case for a few steps and write its last step down."""
    name, values = case["name"], {key: value for key, value in case.items() if key != "name"}
    config, padded = dict(values.pop("config")), values.pop("padded", False)
    setup = TrainingSetup(model=name, **values)
    device = torch.device("cuda", 0)
    hf_config = AutoConfig.for_model(**{"max_position_embeddings": 32768, **config})
    model = build_random_model(
        hf_config,
        dtype=build.torch_dtype(setup),
        device=device,
        attn_implementation=setup.attn_implementation,
        quantization_config=build.quantization_config(setup),
        quantizes_experts=setup.experts == "4bit",
    )
    rows = random_rows(Profile(setup=setup, padded=padded), STEPS, hf_config.vocab_size)
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as output:
        trainer = build.build_trainer(
            setup,
            TrainingJob(setup=setup, model_source=name, data_path="random tokens", max_steps=STEPS),
            model=model,
            tokenizer=_tokenizer(),
            train_dataset=token_dataset(rows),
            eval_dataset=None,
            output_dir=Path(output),
            on_gpu=True,
            callbacks=[recorder],
        )
        trainer.train()
    events, stacks, origins = events_of(recorder.history)
    versions = ", ".join(f"{package} {version}" for package, version in stack.versions())
    about = f"allocations of one training step on {torch.cuda.get_device_name()} ({versions}), in order: "
    about += "a positive number is a block of that many bytes, -1-n frees the n-th block"
    kept = {**values, "config": config, "padded": padded}
    content = {"about": about, "setup": kept, "events": events}
    content |= attributed(setup, config, events, stacks, origins)
    _write(folder / f"{name}.json.gz", content)
    _write(folder / f"{name}.frames.json.gz", {"stacks": stacks, "origins": origins})


def attributed(
    setup: TrainingSetup,
    config: dict[str, Any],
    events: list[int],
    stacks: list[list[str]],
    origins: list[int],
) -> dict[str, Any]:
    """Who holds what at the trace's peak, and where the head runs."""
    weights = inspect_config(config, model_id=setup.model, hub_id=setup.model).parameters
    peak = peak_of(
        events,
        stacks,
        origins,
        weight_elements=frozenset(parameter.elements for parameter in weights),
        compute_bytes=DTYPE_WIDTH[setup.dtype],
    )
    return {"peak": peak.to_dict(), "head": head_span(events, stacks, origins).to_dict()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


def main() -> None:
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    profiler = Profiler()
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        begun = time.perf_counter()
        profiler.reset()
        torch._dynamo.reset()
        try:
            with _quiet():
                record(case, folder)
            outcome = "ok"
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            outcome = f"{type(error).__name__}: {str(error)[-300:]}"
        print(case["name"], outcome, round(time.perf_counter() - begun, 1), flush=True)


if __name__ == "__main__":
    main()
