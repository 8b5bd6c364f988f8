"""Plan a run, show the plan, start exactly it in processes of its own, and follow it to its end.

Ctrl-C asks the run to stop after the current step and to save; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner.answers.plan import Plan
from planner.base.errors import ExitCode, InputError, MissingExtraError
from planner.commands.knobs import add_knobs
from planner.commands.plan import add_request_arguments, request_from
from planner.commands.program import StoreOnce, say, whole_number

if TYPE_CHECKING:
    from launcher.runs.folder import RunFolder, TrainingJob
    from planner.data.lengths import DatasetStats
    from planner.models.spec import ModelSpec
    from planner.setup.request import KnobValue, PlanRequest

NEEDED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "psutil")
# Stands in for planning where this machine has no GPU; the run is then on the CPU.
CARD_WITHOUT_GPU = "16GB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_request_arguments(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are made (runs)")
    parser.add_argument("--name", action=StoreOnce, help="name of the run folder (default: time and model)")
    parser.add_argument("--eval-data", action=StoreOnce, metavar="FILE", help="examples to evaluate on")
    for flag, text in (
        ("--eval-steps", "evaluate every N steps"),
        ("--save-steps", "write a checkpoint every N steps"),
        ("--max-steps", "train N steps whatever the epochs"),
        ("--seed", "seed of order, adapter and dropout (42)"),
    ):
        parser.add_argument(flag, action=StoreOnce, type=whole_number, metavar="N", help=text)
    parser.add_argument("--assistant-only-loss", action="store_true", help="learn the assistant's turns only")
    add_knobs(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, start, follow, compare.

    Raises:
        InputError: what was asked cannot be planned or run.
        MissingExtraError: the training stack is not installed.
    """
    if args.data is None:
        raise InputError("the following arguments are required: --data")
    _require_stack()
    on_gpu = _has_gpu()
    request = _request(args, on_gpu)
    plan = _plan(args, request)
    _show(plan)
    if not on_gpu:
        say(f"no NVIDIA GPU here: planned for {request.gpu}, trained on this machine's CPU")
    if not plan.fits:
        say("nothing was started")
        return ExitCode.DOES_NOT_FIT

    from launcher.training import build

    build.refuse_unsupported(plan.setup, on_gpu=on_gpu)
    folder = _create(args, plan)
    return _follow(folder, plan)


def _require_stack() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError("train", ", ".join(missing))


def _has_gpu() -> bool:
    from planner.gpus.detect import NoGpuError, local_gpus

    try:
        return bool(local_gpus())
    except NoGpuError:
        return False


def _request(args: argparse.Namespace, on_gpu: bool) -> PlanRequest:
    if args.gpu is None and not on_gpu:
        args.gpu = CARD_WITHOUT_GPU
    request = request_from(args)
    if on_gpu:
        return request
    from planner.models.catalog import resolve_model

    model = resolve_model(args.model, allow_network=args.allow_download, inspector=args.inspector)
    knobs = {**_for_the_cpu(model), **request.fixed}
    return dataclasses.replace(request, knobs=tuple(knobs.items()))


def _for_the_cpu(model: ModelSpec) -> dict[str, KnobValue]:
    """What a plan may not choose for a run on the CPU, where the launcher refuses it."""
    return {
        "compile": "none",
        "attn_implementation": model.default_attn_implementation,
        "activation_offloading": False,
    }


def _plan(args: argparse.Namespace, request: PlanRequest) -> Plan:
    from planner.planning.make_plan import make_plan

    stats = _measured_stats(args)
    return make_plan(request, stats=stats, allow_network=args.allow_download, inspector=args.inspector)


def _measured_stats(args: argparse.Namespace) -> DatasetStats:
    """Lengths of the data as the model's own tokenizer makes them."""
    from launcher.training import build, dataset

    data = dataset.read_dataset(Path(args.data))
    tokenizer = build.load_tokenizer(model_source(args), allow_download=args.allow_download)
    return dataset.measure_stats(data, tokenizer, assistant_only_loss=args.assistant_only_loss)


def model_source(args: argparse.Namespace) -> str:
    """Where the weights are: the folder or Hub id as given, else the Hub id of the catalog's model."""
    from planner.models.catalog import resolve_model

    model = resolve_model(args.model, allow_network=args.allow_download, inspector=args.inspector)
    folder = Path(args.model).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    return args.model if "/" in args.model else model.hub_id


def _show(plan: Plan) -> None:
    from planner.text.figures import show
    from planner.text.plan import print_plan

    show(lambda out: print_plan(out, plan))
    print(flush=True)


def _job(args: argparse.Namespace, plan: Plan) -> TrainingJob:
    from launcher.runs.folder import TrainingJob

    schedule = plan.schedule
    return TrainingJob(
        setup=plan.setup,
        model_source=model_source(args),
        data_path=str(Path(args.data).resolve()),
        eval_data_path=None if args.eval_data is None else str(Path(args.eval_data).resolve()),
        learning_rate=schedule.learning_rate,
        num_train_epochs=schedule.num_train_epochs,
        max_steps=args.max_steps,
        warmup_ratio=schedule.warmup_ratio,
        lr_scheduler_type=schedule.lr_scheduler_type,
        seed=42 if args.seed is None else args.seed,
        save_steps=args.save_steps,
        eval_steps=args.eval_steps,
        assistant_only_loss=args.assistant_only_loss,
        allow_download=args.allow_download,
        gpu_index=plan.gpu.position or 0,
    )


def _create(args: argparse.Namespace, plan: Plan) -> RunFolder:
    from launcher.runs.folder import create_run_folder
    from planner.base.data_files import write_atomically

    if args.eval_data is not None:
        from launcher.training.dataset import read_dataset

        read_dataset(Path(args.eval_data))
    folder = create_run_folder(args.runs.expanduser(), _job(args, plan), name=args.name)
    write_atomically(folder.plan, json.dumps(plan.to_dict(), indent=2) + "\n")
    return folder


def _follow(folder: RunFolder, plan: Plan) -> int:
    from launcher.commands.follow import finish, follow_run
    from launcher.runs import supervisor

    handle = supervisor.start(folder.path)
    say(f"run folder: {folder.path}")
    interrupted = follow_run(folder, still_running=lambda: handle.trainer.poll() is None)
    status = handle.wait()
    return finish(folder, status, plan, interrupted=interrupted, out=sys.stdout)
