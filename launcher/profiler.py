"""Measure setups on this GPU with random weights of the published shapes: setup -> RunRecord.

Several setups can share a process: `reset` frees what the stack keeps between runs and refuses to go on when
anything is left. Run `python -m launcher.profiler` for one child process of `vramwise calibrate`.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.data_files import PROFILES
from planner.errors import InputError, VramwiseError
from planner.hardware import LocalGpu, local_gpus
from planner.memory import estimate_memory
from planner.model_catalog import resolve_model
from planner.records import Environment, MeasuredPhase, Predicted, RunRecord, append_record
from planner.training_setup import TrainingSetup

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

STACK = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "liger-kernel")
WARM_UP_STEPS = 2
"""Optimizer state is born in the first step, kernels are compiled in it; the second settles the allocator."""
LEFT_OVER_LIMIT_BYTES = 2**20


class NotCleanError(VramwiseError):
    """A run left memory behind, so the next one in this process would not be measured truly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What to run: a setup, whether batches mix lengths, the steps to measure after warm-up, other phases."""

    setup: TrainingSetup
    padded: bool = False
    steps: int = 3
    evaluates: bool = False
    memory_cap_bytes: int | None = None


def load_config(model_id: str) -> PretrainedConfig:
    """transformers' config of a catalog model, of its language part where it is multimodal."""
    from transformers import AutoConfig

    from planner.model_config import text_part

    values = json.loads((PROFILES / "configs" / f"{model_id}.json").read_text(encoding="utf-8"))
    text, _ = text_part(values)
    text.pop("auto_map", None)
    return AutoConfig.for_model(text.pop("model_type"), **text)


PROFILE_FIELDS = ("padded", "steps", "evaluates", "memory_cap_bytes")


class Profiler:
    """Runs profiles on the first visible GPU of this process."""

    def __init__(self) -> None:
        self._gpu: LocalGpu = local_gpus()[0]
        self._before_bytes = self._gpu.used_bytes
        import torch

        torch.cuda.init()
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        self._device = torch.device("cuda", 0)
        self._context_bytes = self._driver_bytes() - torch.cuda.memory_reserved()
        self._runs = 0
        self.environment = self._describe()

    def measure(self, profile: Profile) -> RunRecord:
        """Build, train and measure one setup; out of memory is an outcome, not an error.

        Raises:
            NotCleanError: memory is left from the run before.
            InputError: the setup cannot be run here.
        """
        import torch

        self.reset()
        if profile.memory_cap_bytes is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(profile.memory_cap_bytes / total)
        # Later runs in a process find what earlier ones left outside torch's allocator: managed memory is
        # never given back, so the driver's figure is a run's own only for the first.
        isolated = self._runs == 0
        run = _Run(profile, self._device, self._driver_bytes if isolated else None)
        try:
            outcome = run.execute()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        record = self._record(profile, run, outcome)
        del run
        self._runs += 1
        return record

    def reset(self) -> None:
        """Free what earlier runs left: cached blocks, cuBLAS workspaces, bitsandbytes' registry.

        Raises:
            NotCleanError: more than a rounding is still allocated.
        """
        import torch

        gc.collect()
        self._forget_embeddings()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
        if left > LEFT_OVER_LIMIT_BYTES:
            raise NotCleanError(f"{left:,} bytes are left on the GPU from an earlier run in this process")

    @staticmethod
    def _forget_embeddings() -> None:
        """bitsandbytes keeps every embedding it was told about, and its model with it, for ever."""
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        manager.module_weight_config_triple = []
        manager.pid2config = {}
        manager.index2config = {}

    def _driver_bytes(self) -> int:
        used = next(gpu.used_bytes for gpu in local_gpus() if gpu.uuid == self._gpu.uuid)
        return max(0, used - self._before_bytes)

    def _describe(self) -> Environment:
        import torch

        properties = torch.cuda.get_device_properties(0)
        return Environment(
            gpu_name=properties.name,
            gpu_id=self._gpu.spec.id,
            compute_capability=(properties.major, properties.minor),
            total_bytes=properties.total_memory,
            driver=_driver_version(),
            python=platform.python_version(),
            versions=tuple(_versions()),
        )

    def _record(self, profile: Profile, run: _Run, outcome: str) -> RunRecord:
        setup = profile.setup
        model = resolve_model(setup.model)
        return RunRecord(
            id=f"{datetime.now(UTC):%Y%m%d}-{uuid.uuid4().hex[:12]}",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            source="calibrate",
            setup=setup,
            model_parameter_count=model.parameter_count,
            environment=self.environment,
            outcome=outcome,
            weights_bytes=run.weights_bytes,
            context_bytes=self._context_bytes,
            phases=tuple(run.phases),
            step_seconds=tuple(round(seconds, 5) for seconds in run.step_seconds),
            tokens_per_second=run.tokens_per_second,
            predicted=_predict(profile),
            padded=profile.padded,
            random_weights=True,
            isolated=self._runs == 0,
            memory_cap_bytes=profile.memory_cap_bytes,
        )


def _predict(profile: Profile) -> Predicted | None:
    from planner.errors import NotModelledError

    model = resolve_model(profile.setup.model)
    gpu = local_gpus()[0].spec
    try:
        breakdown = estimate_memory(profile.setup, model, gpu=gpu, padded=profile.padded)
    except NotModelledError:
        return None
    return Predicted(
        allocated_bytes=breakdown.allocated_bytes,
        reserved_bytes=breakdown.reserved_bytes,
        process_bytes=breakdown.process_bytes,
        process_upper_bytes=breakdown.process_upper_bytes,
        coefficients=breakdown.basis.coefficients,
    )


class _Run:
    """One profile's run: the model, its trainer and what was measured."""

    def __init__(
        self, profile: Profile, device: torch.device, driver_bytes: Callable[[], int] | None
    ) -> None:
        self.profile = profile
        self.weights_bytes = 0
        self.phases: list[MeasuredPhase] = []
        self.step_seconds: list[float] = []
        self._device = device
        self._driver_bytes = driver_bytes

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second over the steps after warm-up."""
        steady = self.step_seconds[WARM_UP_STEPS:]
        if not steady:
            return None
        setup = self.profile.setup
        tokens = setup.tokens_per_micro_step * setup.gradient_accumulation_steps
        return tokens * len(steady) / sum(steady)

    def execute(self) -> str:
        """Train; returns the outcome."""
        import torch

        try:
            with tempfile.TemporaryDirectory() as folder, _quiet():
                self._train(Path(folder))
        except torch.OutOfMemoryError:
            return "oom"
        return "ok"

    def _train(self, folder: Path) -> None:
        import torch

        from launcher import build
        from launcher.random_weights import build_random_model
        from launcher.run_folder import TrainingJob

        setup = self.profile.setup
        config = load_config(setup.model)
        torch.cuda.reset_peak_memory_stats()
        model = build_random_model(
            config,
            dtype=build.torch_dtype(setup),
            device=self._device,
            attn_implementation=setup.attn_implementation,
            quantization_config=build.quantization_config(setup),
        )
        torch.cuda.synchronize()
        self.weights_bytes = torch.cuda.memory_allocated()
        self._close("load")
        steps = WARM_UP_STEPS + self.profile.steps
        rows = _random_rows(self.profile, steps, config.vocab_size)
        data, eval_data = _dataset(rows), _dataset(rows[: 2 * setup.per_device_train_batch_size])
        trainer = build.build_trainer(
            setup,
            TrainingJob(setup=setup, model_source=setup.model, data_path="random tokens", max_steps=steps),
            model=model,
            tokenizer=_tokenizer(),
            train_dataset=data,
            eval_dataset=eval_data if self.profile.evaluates else None,
            output_dir=folder,
            on_gpu=True,
            callbacks=[_step_clock(self.step_seconds)],
        )
        trainer.args.eval_strategy = "no"
        trainer.train()
        torch.cuda.synchronize()
        self._close("step")
        if self.profile.evaluates:
            trainer.evaluate()
            self._close("evaluation")
            trainer.save_model(str(folder / "saved"))
            self._close("save")

    def _close(self, name: str) -> None:
        import torch

        self.phases.append(
            MeasuredPhase(
                name=name,
                allocated_bytes=torch.cuda.max_memory_allocated(),
                reserved_bytes=torch.cuda.max_memory_reserved(),
                process_bytes=self._driver_bytes() if self._driver_bytes is not None else None,
            )
        )
        torch.cuda.reset_peak_memory_stats()


def _step_clock(seconds: list[float]) -> Any:
    """A callback that times optimizer steps, the GPU's work included, and starts peaks anew after warm-up."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):  # type: ignore[misc]
        started = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            if len(seconds) == WARM_UP_STEPS:
                torch.cuda.reset_peak_memory_stats()
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    return StepClock()


def _random_rows(profile: Profile, steps: int, vocab_size: int) -> list[list[int]]:
    """Token ids: full sequences, or every other one half as long when batches are to be padded."""
    import torch

    setup = profile.setup
    generator = torch.Generator().manual_seed(0)
    count = setup.per_device_train_batch_size * setup.gradient_accumulation_steps * steps
    lengths = [
        max(2, setup.max_length // 2) if profile.padded and index % 2 else setup.max_length
        for index in range(count)
    ]
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _dataset(rows: Sequence[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": list(rows), "labels": list(rows)})


def _tokenizer() -> Any:
    from launcher.build import load_tokenizer

    return load_tokenizer(str(PROFILES / "demo" / "model"), allow_download=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries' progress and warnings off stdout and stderr for one run."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _versions() -> Iterator[tuple[str, str]]:
    for package in STACK:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def _driver_version() -> str:
    import torch

    return f"CUDA {torch.version.cuda}"


def run_profiles(profiles: Sequence[Profile], output: Path, *, seconds: float = math.inf) -> int:
    """Measure profiles one after the other in this process, appending each record as it comes.

    Says on stdout, a JSON line each: {"event": "started", "index"} and {"event": "ended", "index", "outcome",
    "seconds", "message"}; a setup that cannot run here has the outcome "refused". No run is started that
    would, at the pace of the slowest so far, end after `seconds`. Returns how many were recorded.
    """
    begun = time.monotonic()
    profiler = Profiler()
    recorded, slowest = 0, 0.0
    for index, profile in enumerate(profiles):
        started = time.monotonic()
        if started - begun + slowest > seconds:
            break
        _say(event="started", index=index)
        try:
            record = profiler.measure(profile)
        except InputError as error:
            _say(event="ended", index=index, outcome="refused", seconds=0.0, message=str(error))
            continue
        append_record(output, record)
        recorded += 1
        took = time.monotonic() - started
        slowest = max(slowest, took)
        _say(event="ended", index=index, outcome=record.outcome, seconds=round(took, 2), message=record.id)
    return recorded


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def profile_line(profile: Profile) -> str:
    """A profile as a JSON line: its setup's keys, and its own beside them."""
    own = {field: getattr(profile, field) for field in PROFILE_FIELDS}
    return json.dumps({**profile.setup.to_dict(), **own})


def read_profiles(path: Path) -> tuple[Profile, ...]:
    """Profiles of a JSON-lines file.

    Raises:
        InputError: a line is not a profile.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number}: {error}") from error
        own = {field: values.pop(field) for field in PROFILE_FIELDS if field in values}
        found.append(Profile(setup=TrainingSetup.from_dict(values), **own))
    return tuple(found)


if __name__ == "__main__":
    run_profiles(read_profiles(Path(sys.argv[1])), Path(sys.argv[2]), seconds=float(sys.argv[3]))
