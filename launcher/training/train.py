"""The training process: `python -m launcher.training.train RUN_DIR` runs the job of a run folder and exits.

It needs nobody to watch it: what it does is told in events.jsonl, what libraries print goes where stdout
goes. SIGHUP is ignored; the first SIGTERM or SIGINT, or a file named `stop`, ends the run after the current
step with the adapter saved; a second signal ends it at once. The exit codes are ends.RunExit.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.runs import stack, trackers
from launcher.runs.allocator import fall_back
from launcher.runs.ends import RunExit
from launcher.runs.events import AdapterEvent, EventWriter, WarningEvent, read_events
from launcher.runs.folder import RunBusyError, RunFolder, hold_lock
from launcher.runs.heartbeat import HeartbeatWriter
from launcher.runs.record import read_plan
from launcher.runs.supervisor import write_identity
from launcher.runs.training_job import TrainingJob
from launcher.training.card import ChosenGpu, choose_gpu, gpu_facts
from launcher.training.ending import RunEnd, StopRequest
from launcher.training.split import Split, trained_too
from launcher.training.stages import Stages
from planner.base.errors import InputError, shorten

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from launcher.training.callbacks import LaunchedTrainer
    from planner.data.reader import TrainingData


def main(arguments: list[str]) -> int:
    """Run the job of the folder named; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m launcher.training.train RUN_DIR", file=sys.stderr)
        return RunExit.BAD_INPUT
    folder = RunFolder(Path(arguments[0]).resolve())
    stop = StopRequest(folder.stop)
    stop.install()
    try:
        with hold_lock(folder, "trainer"):
            if read_events(folder.events):
                raise RunBusyError(f"{folder.path}: this run has been started before; start a new one")
            write_identity(folder, "trainer", os.getpid())
            with EventWriter(folder.events) as writer, HeartbeatWriter(folder.heartbeat) as beats:
                stages = Stages(writer.write, beats.beat)
                with (end := RunEnd(writer)):
                    _run(folder, writer, stop, end, stages)
                if end.state != "finished":
                    print(f"{end.state}: {end.message}", file=sys.stderr)
                return end.code
    except (RunBusyError, OSError) as error:
        print(error, file=sys.stderr)
        return RunExit.BAD_INPUT


def _run(folder: RunFolder, writer: EventWriter, stop: StopRequest, end: RunEnd, stages: Stages) -> None:
    job = folder.read_job()
    stages.enter("loading", "loading the libraries")
    gpu = choose_gpu(job)
    _set_environment(job, folder)
    if (fallen_back := fall_back(os.environ)) is not None:
        _warn(writer, fallen_back)

    import torch

    from launcher.training import build

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    _tell_what_differs(writer, job, gpu, on_gpu=on_gpu)
    stages.enter("loading", "reading the data")
    tokenizer, train_rows, eval_rows = _data(job, writer)

    from launcher.training.callbacks import EventCallback, MemoryMeter
    from launcher.training.evaluation import early_end

    meter = MemoryMeter(writer.write, on_gpu, gpu.used_since_start if gpu else _unknown)
    environment = _environment(device)
    callback = EventCallback(
        write=writer.write, meter=meter, environment=environment, stop_requested=stop.requested
    )
    if on_gpu:
        environment |= gpu_facts(device, gpu)
    stages.enter("loading", "loading the weights")
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
    _equip(trainer, folder, job, writer, stages)
    try:
        trainer.train()
    finally:
        end.step = trainer.state.global_step
    stages.enter("saving", "the adapter" if job.setup.uses_lora else "the model")
    writer.write(save_trained(folder, trainer, tokenizer))
    meter.close("save", end.step)
    if callback.stopped:
        end.stopped(f"stopped on request after step {end.step}; the adapter is saved")
        return
    end.message = early_end(trainer.state, job)


def _equip(
    trainer: LaunchedTrainer, folder: RunFolder, job: TrainingJob, writer: EventWriter, stages: Stages
) -> None:
    """Have the longest micro-batch go first, trackers told, and what is done said from here on."""
    from launcher.training.heart import HeartbeatCallback
    from launcher.training.rehearsal import Rehearsal

    trainer.tell = functools.partial(_warn, writer)
    if job.track:
        from launcher.training.tracking import tracker_callbacks

        for callback in tracker_callbacks(job, trainer.tell):
            trainer.add_callback(callback)
    compiles = job.setup.compile != "none"
    tell = functools.partial(stages.enter, "rehearsing")
    trainer.add_callback(Rehearsal(trainer, tell, planned_bytes=_planned_bytes(folder)))
    trainer.add_callback(HeartbeatCallback(stages.beat, compiles=compiles))
    # The rehearsal is the first to run the layers, and so to compile them.
    stages.enter("compiling" if compiles else "rehearsing")


def _tell_what_differs(writer: EventWriter, job: TrainingJob, gpu: ChosenGpu | None, *, on_gpu: bool) -> None:
    """Say what runs otherwise here than was asked.

    Raises:
        InputError: what cannot run here at all.
        MissingExtraError: a package for it is not installed.
    """
    from launcher.training import build

    build.refuse_unsupported(job.setup, on_gpu=on_gpu)
    if gpu is not None and not on_gpu:
        _warn(writer, f"{gpu.name} is here, but this torch cannot use it; training on the CPU")
    for sentence in build.substitutions(job.setup, on_gpu=on_gpu):
        _warn(writer, sentence)


def _data(job: TrainingJob, writer: EventWriter) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset | None]:
    """The tokenizer, and what it makes of the job's data."""
    from launcher.training import build, dataset

    train_data = dataset.read_dataset(Path(job.data_path))
    eval_data = dataset.read_dataset(Path(job.eval_data_path)) if job.eval_data_path else None
    tokenizer = build.load_tokenizer(job.model_source, allow_download=job.allow_download)
    if dataset.needs_chat_template(train_data) and dataset.ensure_chat_template(tokenizer):
        _warn(writer, "the tokenizer has no chat template; ChatML is used and saved with the adapter")

    length, assistant = job.setup.max_length, job.assistant_only_loss

    def made(data: TrainingData) -> Dataset:
        rows = dataset.to_trl_dataset(data, tokenizer, max_length=length, assistant_only_loss=assistant)
        tell_untrained(data, len(rows))
        return rows

    def tell_untrained(data: TrainingData, kept: int) -> None:
        every = len(data.examples)
        if kept < every:
            _warn(writer, f"{data.source}: {every - kept:,} of {every:,} examples have no token to learn")

    if job.eval_split is not None:
        parts = dataset.split_trl_datasets(
            train_data,
            tokenizer,
            max_length=length,
            split=Split(job.eval_split, job.seed),
            assistant_only_loss=assistant,
        )
        tell_untrained(train_data, sum(map(len, parts)))
        return tokenizer, *parts
    train_rows = made(train_data)
    if eval_data is None:
        return tokenizer, train_rows, None
    eval_rows = made(eval_data)
    if shared := len(trained_too(eval_rows, train_rows)):
        _warn(
            writer,
            f"{shared:,} of {len(eval_rows):,} examples of {eval_data.source} are trained on too: their loss "
            "says nothing about what is new",
        )
    return tokenizer, train_rows, eval_rows


def save_trained(folder: RunFolder, trainer: Any, tokenizer: Any) -> AdapterEvent:
    """Write adapter/ (safetensors and the tokenizer) so that it appears whole or not at all.

    It is that of the best evaluation where a later step was worse, as its checkpoint holds it.
    """
    from launcher.training.evaluation import best_checkpoint, weight_files

    partial = folder.path / ".adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model, step = trainer.model, trainer.state.global_step
    best = best_checkpoint(trainer.state, folder.checkpoints)
    if best is not None and best.step < step:
        partial.mkdir()
        for path in weight_files(best.path):
            shutil.copyfile(path, partial / path.name)
    else:
        # PEFT's "auto" would ask the Hub whether the vocabulary was resized; it never is here.
        options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(partial, **options)
    tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(folder.adapter)
    return AdapterEvent(
        time=time.time(),
        step=step if best is None else best.step,
        path=str(folder.adapter),
        evaluation_loss=None if best is None else best.loss,
    )


def _unknown() -> None:
    return None


def _set_environment(job: TrainingJob, folder: RunFolder) -> None:
    """What libraries read at import: no network unless asked, no telemetry, no forked tokenizer threads."""
    trackers.prepare(job.track, folder.tracking, allow_upload=job.allow_upload)
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


def _warn(writer: EventWriter, message: str) -> None:
    writer.write(WarningEvent(time=time.time(), message=shorten(message, 500).strip("'\"")))


def _planned_bytes(folder: RunFolder) -> int | None:
    """What the plan has for a step's reserve; None for a job made by hand, or where the file is damaged."""
    try:
        plan = read_plan(folder)
    except InputError:
        return None
    return None if plan is None else plan.memory.reserved_bytes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
