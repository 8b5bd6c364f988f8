"""The training process: `python -m launcher.training.train RUN_DIR` runs the job of a run folder and exits.

It needs nobody to watch it: what it does is told in events.jsonl, what libraries print goes where stdout
goes. SIGHUP is ignored; the first SIGTERM or SIGINT, or a file named `stop`, ends the run after the current
step with the adapter saved; a second signal ends it at once. The exit codes are run_folder.TrainerExit.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from launcher.runs import stack
from launcher.runs.allocator import fall_back, process_allocator
from launcher.runs.events import EndEvent, EventWriter, WarningEvent, read_events
from launcher.runs.folder import RunBusyError, RunFolder, TrainerExit, TrainingJob, hold_lock
from launcher.runs.supervisor import write_identity
from planner.base.errors import InputError, VramwiseError, shorten

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from planner.data.reader import TrainingData

# Said by torch's CPU allocator, by CUDA calls outside torch's allocator, and by cuBLAS.
OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(slots=True)
class StopRequest:
    """Whether somebody asked the run to end."""

    file: Path
    signalled: bool = field(default=False, init=False)

    def install(self) -> None:
        """Take over the signals."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def requested(self) -> bool:
        """Whether a signal has come or the file is there."""
        return self.signalled or self.file.exists()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True


@dataclass(slots=True)
class RunEnd:
    """Context of a run that writes the end event, whatever ends it, and knows the exit code.

    Errors that are no bug end here; any other passes on after its event, so that its traceback is in the log.
    """

    writer: EventWriter
    step: int = 0
    state: str = "finished"
    message: str = ""
    code: TrainerExit = TrainerExit.FINISHED

    def __enter__(self) -> RunEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        understood = True
        if error is not None:
            self.message = f"{type(error).__name__}: {error}"
            understood = self._classify(error)
        self.writer.write(
            EndEvent(time=time.time(), state=self.state, message=self.message[:2000], step=self.step)
        )
        return understood

    def stopped(self, message: str) -> None:
        """The run ended on request."""
        self.state, self.message, self.code = "stopped", message, TrainerExit.STOPPED

    def _classify(self, error: BaseException) -> bool:
        if isinstance(error, KeyboardInterrupt):
            self.stopped("stopped at once by a second signal; the adapter was not saved")
        elif is_out_of_memory(error):
            self.state, self.code = "oom", TrainerExit.OOM
        elif type(error).__name__ == "DivergedError":
            self.state, self.message, self.code = "diverged", str(error), TrainerExit.DIVERGED
        elif isinstance(error, VramwiseError):
            code = TrainerExit.BAD_INPUT if isinstance(error, InputError) else TrainerExit.FAILED
            self.state, self.message, self.code = "failed", str(error), code
        else:
            self.state, self.code = "failed", TrainerExit.FAILED
            return False
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the GPU or the host ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)


def main(arguments: list[str]) -> int:
    """Run the job of the folder named; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m launcher.training.train RUN_DIR", file=sys.stderr)
        return TrainerExit.BAD_INPUT
    folder = RunFolder(Path(arguments[0]).resolve())
    stop = StopRequest(folder.stop)
    stop.install()
    try:
        with hold_lock(folder, "trainer"):
            if read_events(folder.events):
                raise RunBusyError(f"{folder.path}: this run has been started before; start a new one")
            write_identity(folder, "trainer", os.getpid())
            with EventWriter(folder.events) as writer:
                with (end := RunEnd(writer)):
                    _run(folder, folder.read_job(), writer, stop, end)
                if end.state != "finished":
                    print(f"{end.state}: {end.message}", file=sys.stderr)
                return end.code
    except (RunBusyError, OSError) as error:
        print(error, file=sys.stderr)
        return TrainerExit.BAD_INPUT


def _run(folder: RunFolder, job: TrainingJob, writer: EventWriter, stop: StopRequest, end: RunEnd) -> None:
    gpu = _choose_gpu(job)
    _set_environment(job)
    fallen_back = fall_back(os.environ)
    if fallen_back is not None:
        _warn(writer, fallen_back)

    import torch

    from launcher.training import build

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    build.refuse_unsupported(job.setup, on_gpu=on_gpu)
    if gpu is not None and not on_gpu:
        _warn(writer, f"{gpu.name} is here, but this torch cannot use it; training on the CPU")
    for sentence in build.substitutions(job.setup, on_gpu=on_gpu):
        _warn(writer, sentence)
    tokenizer, train_rows, eval_rows = _data(job, writer)

    from launcher.training.callbacks import EventCallback, MemoryMeter

    meter = MemoryMeter(writer.write, on_gpu, gpu.used_since_start if gpu else _unknown)
    environment = _environment(device)
    callback = EventCallback(
        write=writer.write, meter=meter, environment=environment, stop_requested=stop.requested
    )
    if on_gpu:
        environment |= _gpu_facts(device, gpu)
    model = build.load_model(job.setup, job.model_source, device=device, allow_download=job.allow_download)
    if on_gpu:
        environment["weights_bytes"] = torch.cuda.memory_allocated(device)
    meter.close("load", 0)
    trainer = build.build_trainer(
        job.setup,
        job,
        model=model,
        tokenizer=tokenizer,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        output_dir=folder.checkpoints,
        on_gpu=on_gpu,
        callbacks=[callback],
    )
    if stop.requested():
        end.stopped("stopped before the first step; there is nothing to save")
        return
    try:
        trainer.train()
    finally:
        end.step = trainer.state.global_step
    save_adapter(folder, trainer.model, tokenizer)
    meter.close("save", end.step)
    if callback.stopped:
        end.stopped(f"stopped on request after step {end.step}; the adapter is saved")


def _data(job: TrainingJob, writer: EventWriter) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset | None]:
    """The tokenizer, and what it makes of the job's data."""
    from launcher.training import build, dataset

    train_data = dataset.read_dataset(Path(job.data_path))
    eval_data = dataset.read_dataset(Path(job.eval_data_path)) if job.eval_data_path else None
    tokenizer = build.load_tokenizer(job.model_source, allow_download=job.allow_download)
    if dataset.needs_chat_template(train_data) and dataset.ensure_chat_template(tokenizer):
        _warn(writer, "the tokenizer has no chat template; ChatML is used and saved with the adapter")

    def rows(data: TrainingData) -> Dataset:
        made = dataset.to_trl_dataset(
            data,
            tokenizer,
            max_length=job.setup.max_length,
            assistant_only_loss=job.assistant_only_loss,
        )
        if len(made) < len(data.examples):
            left = len(data.examples) - len(made)
            _warn(
                writer,
                f"{data.source}: {left:,} of {len(data.examples):,} examples have no token to learn",
            )
        return made

    return tokenizer, rows(train_data), None if eval_data is None else rows(eval_data)


def save_adapter(folder: RunFolder, model: Any, tokenizer: Any) -> None:
    """Write adapter/ (safetensors and the tokenizer) so that it appears whole or not at all."""
    partial = folder.path / ".adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    # PEFT's "auto" would ask the Hub whether the vocabulary was resized; it never is here.
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(partial, **options)
    tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(folder.adapter)


@dataclass(frozen=True, slots=True)
class ChosenGpu:
    """The GPU of this run, as NVML sees it, and what was in use on it before this process took any."""

    name: str
    uuid: str
    used_before_bytes: int

    def used_since_start(self) -> int | None:
        """What is used on the GPU beyond what was before; None if the driver stopped answering."""
        from planner.gpus.detect import NoGpuError, local_gpus

        try:
            used = next((gpu.used_bytes for gpu in local_gpus() if gpu.uuid == self.uuid), None)
        except NoGpuError:
            return None
        return None if used is None else max(0, used - self.used_before_bytes)


def _unknown() -> None:
    return None


def _choose_gpu(job: TrainingJob) -> ChosenGpu | None:
    """Make the job's GPU the only visible one; None when NVML shows none (torch then decides)."""
    from planner.gpus.detect import NoGpuError, local_gpus

    try:
        gpus = local_gpus()
    except NoGpuError:
        return None
    if job.gpu_index >= len(gpus):
        raise InputError(f"gpu_index={job.gpu_index}: only {len(gpus)} GPUs are visible")
    gpu = gpus[job.gpu_index]
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu.uuid
    return ChosenGpu(gpu.spec.name, gpu.uuid, gpu.used_bytes)


def _set_environment(job: TrainingJob) -> None:
    """What libraries read at import: no network unless asked, no telemetry, no forked tokenizer threads."""
    if not job.allow_download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _environment(device: torch.device) -> dict[str, str | int | float | None]:
    import torch

    values: dict[str, str | int | float | None] = {"python": platform.python_version()}
    values |= stack.versions()
    values["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    values["cuda"] = torch.version.cuda
    values["cpu_threads"] = torch.get_num_threads()
    return values


def _gpu_facts(device: torch.device, gpu: ChosenGpu | None) -> dict[str, str | int | float | None]:
    """What a run record says of the GPU; `context_bytes` is what the driver shows before the model loads."""
    import torch

    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    properties = torch.cuda.get_device_properties(device)
    used = None if gpu is None else gpu.used_since_start()
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_total_bytes": properties.total_memory,
        "allocator": process_allocator(os.environ),
        "context_bytes": None if used is None else max(0, used - torch.cuda.memory_reserved(device)),
    }


def _warn(writer: EventWriter, message: str) -> None:
    writer.write(WarningEvent(time=time.time(), message=shorten(message, 500).strip("'\"")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
