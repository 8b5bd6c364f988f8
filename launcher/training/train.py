"""The training process: `python -m launcher.training.train RUN_DIR` runs the job of a run folder and exits.

It needs nobody to watch it: what it does is told in events.jsonl, what libraries print goes where stdout
goes. SIGHUP is ignored; SIGUSR1, the first SIGTERM or SIGINT, or a file named `stop`, ends the run after the
current step with the adapter saved; a second SIGTERM or SIGINT ends it at once; SIGUSR2 writes the stacks of
its threads to stderr. The exit codes are ends.RunExit.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import platform
import sys
import time
import traceback
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.runs import stack
from launcher.runs.allocator import fall_back
from launcher.runs.attempts import Attempt
from launcher.runs.ends import RunExit
from launcher.runs.events import EndEvent, EventWriter, WarningEvent
from launcher.runs.folder import RunBusyError, RunFolder, anchored, hold_lock
from launcher.runs.heartbeat import STACKS_SIGNAL, HeartbeatWriter
from launcher.runs.kept import checkpoints, fingerprint
from launcher.runs.minding.ranks import RankEnd, lock_name, stacks_file, tell_end
from launcher.runs.record import whole_plan
from launcher.runs.training_job import TrainingJob
from launcher.training.card import ChosenGpu, choose_gpu, gpu_facts
from launcher.training.ending import RunEnd, StopRequest, is_out_of_memory
from launcher.training.opening import begin_attempt, refuse_started, set_environment
from launcher.training.several.ranks import Ranks, asked_ranks, end_with_parent, join
from launcher.training.stages import Stages, compiling_words
from launcher.training.watching.patience import PatientWriter
from planner.base.errors import InputError, shorten
from planner.base.importing import uncollected

if TYPE_CHECKING:
    import torch

    from launcher.training.callbacks import EventCallback, LaunchedTrainer
    from launcher.training.watching.memory_meter import MemoryMeter

NOT_KEPT = "no checkpoints are saved, so the adapter is that of the last step and not of the best evaluation"


def main(arguments: list[str]) -> int:
    """Run the job of the folder named; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m launcher.training.train RUN_DIR", file=sys.stderr)
        return RunExit.BAD_INPUT
    folder, ranks = RunFolder(Path(arguments[0]).resolve()), asked_ranks()
    stop = StopRequest(folder.stop)
    stop.install()
    faulthandler.enable()
    with ExitStack() as open_ones:
        try:
            if ranks.alone:
                faulthandler.register(STACKS_SIGNAL, all_threads=True)
            else:
                end_with_parent()
                stacks = open_ones.enter_context(stacks_file(folder, ranks.local_rank).open("wb"))
                faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
            open_ones.enter_context(hold_lock(folder, lock_name(ranks.local_rank)))
            held = open_ones.enter_context(anchored(folder))
            if ranks.tells:
                refuse_started(folder)
            writer = open_ones.enter_context(EventWriter(held.events if ranks.tells else Path(os.devnull)))
            beats = open_ones.enter_context(
                HeartbeatWriter(held.heartbeat if ranks.tells else Path(os.devnull))
            )
        except (RunBusyError, InputError, OSError) as error:
            print(error, file=sys.stderr)
            return RunExit.BAD_INPUT
        stop.file = held.stop
        stages = Stages(writer.write, beats.beat)
        end = RunEnd(writer, writes=ranks.tells)
        if not ranks.alone:
            end.tell = functools.partial(_tell_keeper, held, ranks)
        with end:
            _run(held, writer, stop, end, stages, ranks)
        if end.state != "finished":
            print(f"{end.state}: {end.message}", file=sys.stderr)
        # What all ranks do on request is one end, and the first of them tells it by its code.
        return end.code if ranks.tells or end.state not in ("stopped", "finished") else RunExit.FINISHED


def _tell_keeper(folder: RunFolder, ranks: Ranks, end: EndEvent) -> None:
    tell_end(
        folder,
        RankEnd(
            rank=ranks.rank,
            time=end.time,
            state=end.state,
            message=end.message,
            step=end.step,
            room_bytes=end.room_bytes,
        ),
    )


def _refuse_unlike(job: TrainingJob, attempt: Attempt, ranks: Ranks) -> None:
    """See that all machines train the same from the same step: each has planned, and resumes, by itself.

    Raises:
        InputError: they do not.
    """
    said = json.dumps([job.setup.to_dict(), job.seed, job.num_train_epochs, job.max_steps], sort_keys=True)
    if len(set(ranks.exchange(attempt.from_step, zlib.crc32(said.encode("utf-8"))))) > 1:
        raise InputError(
            "the machines do not train alike (setup, steps or the step to go on from): give all of them the "
            "same --plan, and before resuming copy checkpoints/ from that with --node-rank 0 to the others"
        )


def _run(
    folder: RunFolder, writer: EventWriter, stop: StopRequest, end: RunEnd, stages: Stages, ranks: Ranks
) -> None:
    job, attempt = begin_attempt(folder, writer, ranks)
    end.step = attempt.from_step
    stages.enter("loading", "loading the libraries")
    gpu = choose_gpu(job, ranks)
    if gpu is not None:
        end.room = gpu.room
    set_environment(job, folder)
    if (fallen_back := fall_back(os.environ)) is not None:
        _warn(writer, fallen_back)

    with uncollected():
        from launcher.training import saving
        from launcher.training.evaluation import early_end
        from launcher.training.watching.memory_meter import MemoryMeter  # noqa: F401 - with the trainer's own imports

    device = _device(job, gpu, writer, ranks)
    join(ranks, on_gpu=device.type == "cuda")
    _refuse_unlike(job, attempt, ranks)
    meter = _meter(writer, gpu, device, ranks)
    trainer, callback = _build(folder, job, device, gpu, meter, writer, stop, stages, ranks)
    patient = PatientWriter(write=writer.write, beat=stages.write_beat, stop_requested=stop.requested)
    _prepare_saving(trainer, folder, job, patient, attempt)
    if ranks.any(stop.requested()):
        end.stopped("stopped before the first step; there is nothing to save")
        return
    _equip(trainer, folder, job, writer, stages)
    _train(trainer, folder, attempt, end)
    stages.enter("saving", "the adapter" if job.setup.uses_lora else "the model")
    saved = saving.save_adapter(folder, patient, trainer, end.step)
    if saved is not None:
        writer.write(saved)
    # A rank that ended before the one that saves would have torchrun end that one too.
    ranks.wait()
    meter.close("save", end.step)
    if callback.stopped:
        where = "" if ranks.saves or ranks.local_rank else " on the machine with --node-rank 0"
        end.stopped(f"stopped on request after step {end.step}; the adapter is saved{where}")
        return
    end.message = early_end(trainer.state, job)


def _meter(writer: EventWriter, gpu: ChosenGpu | None, device: torch.device, ranks: Ranks) -> MemoryMeter:
    from launcher.training.watching.memory_meter import MemoryMeter

    used = gpu.used_since_start if gpu else _unknown
    return MemoryMeter(writer.write, device.type == "cuda", used, ranks)


def _build(
    folder: RunFolder,
    job: TrainingJob,
    device: torch.device,
    gpu: ChosenGpu | None,
    meter: MemoryMeter,
    writer: EventWriter,
    stop: StopRequest,
    stages: Stages,
    ranks: Ranks,
) -> tuple[LaunchedTrainer, EventCallback]:
    """The trainer of the job on its data and model, and what tells its events."""
    import torch

    from launcher.training import build
    from launcher.training.callbacks import EventCallback
    from launcher.training.several.loading import load_for_ranks
    from launcher.training.several.rows import SharedRows, made_rows

    on_gpu = device.type == "cuda"
    stages.enter("loading", "reading the data")
    rows = SharedRows(folder, ranks)
    tokenizer, train_rows, eval_rows = rows.share(
        lambda: made_rows(job, functools.partial(_warn, writer)),
        lambda: build.load_tokenizer(job.model_source, allow_download=job.allow_download),
    )
    if ranks.tells and not folder.fingerprint.exists():
        fingerprint.write(folder, fingerprint.take(folder.read_job()))
    environment = _environment(device)
    callback = EventCallback(
        write=writer.write,
        meter=meter,
        environment=environment,
        stop_requested=lambda: ranks.any(stop.requested()),
    )
    if on_gpu:
        environment |= gpu_facts(device, gpu)
    stages.enter("loading", "loading the weights")
    model = load_for_ranks(job, device)
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
    trainer.ranks = ranks
    rows.forget()
    return trainer, callback


def _equip(
    trainer: LaunchedTrainer, folder: RunFolder, job: TrainingJob, writer: EventWriter, stages: Stages
) -> None:
    """Have the longest micro-batch go first, trackers told, and what is done said from here on."""
    from launcher.training.products.agreement import check_layers
    from launcher.training.rehearsal import Rehearsal
    from launcher.training.watching.heart import HeartbeatCallback

    trainer.tell = functools.partial(_warn, writer)
    if job.track:
        from launcher.training.tracking import tracker_callbacks

        for callback in tracker_callbacks(job, trainer.tell):
            trainer.add_callback(callback)
    compiles = job.setup.compile != "none"
    tell = functools.partial(stages.enter, "rehearsing")
    check_layers(trainer, job.setup, functools.partial(stages.enter, "compiling"))
    plan = whole_plan(folder)
    planned = None if plan is None else plan.memory.reserved_bytes
    trainer.add_callback(Rehearsal(trainer, tell, planned_bytes=planned))
    trainer.add_callback(HeartbeatCallback(stages.beat, compiles=compiles))
    # The rehearsal is the first to run the layers, and so to compile them.
    stages.enter("compiling" if compiles else "rehearsing", compiling_words(plan) if compiles else "")


def _device(job: TrainingJob, gpu: ChosenGpu | None, writer: EventWriter, ranks: Ranks) -> torch.device:
    """What the job is trained on; tells what differs there from what was asked.

    Raises:
        InputError: the setup cannot be run there.
    """
    import torch

    from launcher.training import build

    on_gpu = torch.cuda.is_available()
    build.refuse_unsupported(job.setup, on_gpu=on_gpu)
    if gpu is not None and not on_gpu:
        _warn(writer, f"{gpu.name} is here, but this torch cannot use it; training on the CPU")
    for sentence in build.substitutions(job.setup, on_gpu=on_gpu):
        _warn(writer, sentence)
    return torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")


def _prepare_saving(
    trainer: LaunchedTrainer, folder: RunFolder, job: TrainingJob, patient: PatientWriter, attempt: Attempt
) -> None:
    """Clear what a death has left half written, and have checkpoints saved where they are asked for."""
    from launcher.training.evaluation import protected_steps
    from launcher.training.saving import CheckpointSaver, SavingTimes

    if trainer.ranks.saves:
        folder.clear_partial()
        checkpoints.clear_partial(folder.checkpoints)
    if job.checkpoints:
        known = {attempt.from_step} if attempt.from_step else set()
        trainer.save_with(
            CheckpointSaver(
                folder,
                patient,
                job.keep_checkpoints,
                known,
                protected=lambda: protected_steps(trainer.state),
                ranks=trainer.ranks,
            )
        )
        trainer.add_callback(SavingTimes(job, ranks=trainer.ranks))
    elif job.evaluates:
        patient.write(WarningEvent(time=time.time(), message=NOT_KEPT))


def _train(trainer: LaunchedTrainer, folder: RunFolder, attempt: Attempt, end: RunEnd) -> None:
    """Train to the end, from the attempt's checkpoint on.

    Raises:
        DivergedError, RuntimeError, MemoryError: a step would have diverged, or ran out of memory; what was
            good before it is saved.
    """
    from launcher.training.callbacks import DivergedError, NothingLeftError

    step = attempt.from_step
    checkpoint = str(checkpoints.path_of(folder.checkpoints, step)) if step else None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except NothingLeftError:
        pass
    except (DivergedError, RuntimeError, MemoryError) as error:
        # Memory runs out on one rank, and what is saved is on all.
        if isinstance(error, DivergedError) or (is_out_of_memory(error) and trainer.ranks.alone):
            # The frames of the step hold what it computed: memory that the save may need.
            traceback.clear_frames(error.__traceback__)
            trainer.save_last_good()
        raise
    finally:
        end.step = max(step, trainer.state.global_step)


def _unknown() -> None:
    return None


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
