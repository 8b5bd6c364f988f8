"""Plan a run, show the plan, start exactly it in processes of its own, and follow it to its end.

Ctrl-C asks the run to stop after the current step and to save; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.saved_plan import plan_for_here, take_saved_plan
from launcher.runs import stack
from launcher.runs.trackers import TRACKERS, checked, require
from planner.answers.plan import Plan
from planner.base.errors import ExitCode, InputError
from planner.commands.knobs import add_knobs
from planner.commands.plan import add_request_arguments, request_from
from planner.commands.program import StoreOnce, real_number, say, whole_number

if TYPE_CHECKING:
    from launcher.runs.folder import RunFolder
    from launcher.runs.job import JobWish
    from launcher.runs.training_job import TrainingJob
    from planner.data.lengths import DatasetStats
    from planner.models.spec import ModelSpec
    from planner.setup.request import KnobValue

# Stands in for planning where this machine has no GPU; the run is then on the CPU.
CARD_WITHOUT_GPU = "16GB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_request_arguments(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are made (runs)")
    parser.add_argument("--name", action=StoreOnce, help="name of the run folder (default: time and model)")
    parser.add_argument(
        "--plan",
        action=StoreOnce,
        type=Path,
        metavar="FILE",
        help="launch the plan that plan -o saved",
    )
    parser.add_argument("--dry-run", action="store_true", help="all but the start; nothing is left behind")
    parser.add_argument("--eval-data", action=StoreOnce, metavar="FILE", help="examples to evaluate on")
    parser.add_argument(
        "--eval-split",
        action=StoreOnce,
        type=real_number,
        metavar="X",
        help="evaluate on this share of the data (0.05), or so many examples of it (50); train the rest",
    )
    for flag, text in (
        ("--eval-steps", "evaluate every N steps (default: after each epoch)"),
        ("--early-stopping-patience", "end when the evaluation loss has not fallen N times in a row"),
        ("--save-steps", "write a checkpoint every N steps"),
        ("--max-steps", "train N steps whatever the epochs"),
        ("--seed", "seed of order, adapter and dropout (42)"),
    ):
        parser.add_argument(flag, action=StoreOnce, type=whole_number, metavar="N", help=text)
    parser.add_argument(
        "--track",
        action="append",
        choices=tuple(TRACKERS),
        default=[],
        help="tell a tracker too, in the run folder alone; may be given for each",
    )
    parser.add_argument(
        "--allow-upload", action="store_true", help="wandb may send what it is told to its server"
    )
    parser.add_argument("--assistant-only-loss", action="store_true", help="learn the assistant's turns only")
    add_knobs(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, start, follow, compare.

    Raises:
        InputError: what was asked cannot be planned or run.
        MissingExtraError: the training stack is not installed.
    """
    saved = None if args.plan is None else take_saved_plan(args)
    if args.data is None:
        raise InputError("the following arguments are required: --data")
    stack.require("train")
    from launcher.runs.folder import planned_folder, refuse_taken
    from launcher.runs.job import create_planned_run, job_of, model_source
    from planner.models.catalog import resolve_model
    from planner.planning.make_plan import make_plan

    require(args.track)
    root: Path = args.runs.expanduser()
    if args.name is not None:
        # Before data is read and a plan is made.
        refuse_taken(root / args.name)
    on_gpu = _has_gpu()
    if args.gpu is None and not on_gpu:
        args.gpu = CARD_WITHOUT_GPU
    request = request_from(args) if saved is None else saved.request
    model = resolve_model(args.model, allow_network=args.allow_download, inspector=args.inspector)
    source = model_source(args.model, model)
    if not args.allow_download:
        _refuse_absent_weights(source, model)
    if not on_gpu:
        knobs = {**_for_the_cpu(model), **request.fixed}
        request = dataclasses.replace(request, knobs=tuple(knobs.items()))
    wish = _wish(args, source)
    stats = _measured_stats(wish)
    if saved is None:
        plan = make_plan(request, model=model, stats=stats)
    else:
        plan = plan_for_here(saved, name=args.model, model=model, stats=stats, data=args.data, on_gpu=on_gpu)
    _show(plan)
    for line in (*stats.notes, *stats.not_trained(plan.setup.max_length)):
        say(line)
    if not on_gpu:
        say(f"no NVIDIA GPU here: planned for {plan.gpu.text}, trained on this machine's CPU")
    if not plan.fits:
        say("nothing was started")
        return ExitCode.DOES_NOT_FIT

    from launcher.training import build

    build.refuse_unsupported(plan.setup, on_gpu=on_gpu)
    if wish.eval_data is not None:
        _measured_stats(dataclasses.replace(wish, data=wish.eval_data)).not_trained(plan.setup.max_length)
    if args.dry_run:
        job = job_of(plan, wish)
        return _dry_run(plan, job, planned_folder(root, job, name=args.name))
    folder = create_planned_run(root, plan, wish, name=args.name)
    return _follow(folder)


def _dry_run(plan: Plan, job: TrainingJob, folder: Path) -> int:
    """Say what would be started."""
    from launcher.commands.dry_run import print_dry_run
    from planner.text.figures import show

    show(lambda out: print_dry_run(out, plan, job, folder.absolute()))
    return ExitCode.OK


def _has_gpu() -> bool:
    from planner.gpus.detect import NoGpuError, local_gpus

    try:
        return bool(local_gpus())
    except NoGpuError:
        return False


def _refuse_absent_weights(source: str, model: ModelSpec) -> None:
    """Say at once, before data and libraries are read, that there is nothing to train.

    Raises:
        InputError: the weights of a Hub id are not in its cache.
    """
    if Path(source).is_dir():
        return
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    if not any(isinstance(try_to_load_from_cache(source, name), str) for name in names):
        size = "" if model.download_bytes is None else f" {model.download_bytes / 2**30:,.1f} GiB"
        raise InputError(
            f"the weights of {source} are not on this machine; --allow-download fetches{size or ' them'}"
        )


def _for_the_cpu(model: ModelSpec) -> dict[str, KnobValue]:
    """What a plan may not choose for a run on the CPU, where the launcher refuses it."""
    return {
        "compile": "none",
        "attn_implementation": model.default_attn_implementation,
        "activation_offloading": False,
    }


def _wish(args: argparse.Namespace, model_source: str) -> JobWish:
    from launcher.runs.job import JobWish

    return JobWish(
        model_source=model_source,
        data=Path(args.data),
        eval_data=None if args.eval_data is None else Path(args.eval_data),
        eval_split=args.eval_split,
        early_stopping_patience=args.early_stopping_patience,
        max_steps=args.max_steps,
        save_steps=args.save_steps,
        eval_steps=args.eval_steps,
        seed=args.seed,
        assistant_only_loss=args.assistant_only_loss,
        allow_download=args.allow_download,
        track=checked(args.track),
        allow_upload=args.allow_upload,
    )


def _measured_stats(wish: JobWish) -> DatasetStats:
    """Lengths of the data as the model's own tokenizer makes them."""
    from launcher.training import build, dataset
    from launcher.training.split import Split

    data = dataset.read_dataset(wish.data)
    tokenizer = build.load_tokenizer(wish.model_source, allow_download=wish.allow_download)
    split = None if wish.eval_split is None else Split(wish.eval_split, wish.used_seed)
    return dataset.measure_stats(data, tokenizer, assistant_only_loss=wish.assistant_only_loss, split=split)


def _show(plan: Plan) -> None:
    from planner.text.figures import show
    from planner.text.plan import print_plan

    show(lambda out: print_plan(out, plan))
    print(flush=True)


def _follow(folder: RunFolder) -> int:
    from launcher.commands.follow import finish, follow_run
    from launcher.runs import supervisor

    handle = supervisor.start(folder.path)
    say(f"run folder: {folder.path}")
    interrupted = follow_run(folder, still_running=lambda: handle.trainer.poll() is None)
    status = handle.wait()
    return finish(folder, status, interrupted=interrupted, out=sys.stdout)
