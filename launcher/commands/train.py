"""Plan a run, show the plan, start exactly it in processes of its own, and follow it to its end.

Ctrl-C, SIGTERM and SIGUSR1 ask the run to stop after the current step and to save; a second Ctrl-C ends it at
once, a third kills the trainer. Exit codes: docs/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.interrupts import sigterm_as_ctrl_c
from launcher.commands.nodes import add_nodes, nodes_wish
from launcher.commands.runs_folder import add_runs_option, refuse_taken, run_name, runs_root
from launcher.commands.saved_plan import plan_for_here, take_saved_plan
from launcher.commands.saving import add_saving, saving_in_words, saving_wish
from launcher.commands.waiting import (
    is_full,
    its_gpus_were_waited_for,
    see_that_the_gpu_is_free,
    waited_for_room,
)
from launcher.runs import stack
from launcher.runs.trackers import TRACKERS, checked, require
from launcher.training.engines.asked import (
    UNSLOTH,
    OtherEngine,
    add_engine,
    engine_asked,
    plan_for_engine,
    say_of_engine,
    taken,
    wish_for,
)
from planner.answers.plan import Plan
from planner.base.errors import ExitCode, InputError, MissingExtraError
from planner.base.settings import card_asked_for
from planner.commands.knobs import add_knobs
from planner.commands.plan import add_request_arguments, request_from
from planner.commands.program import StoreOnce, real_number, say, whole_number

if TYPE_CHECKING:
    from launcher.runs.job import JobWish
    from planner.data.lengths import DatasetStats
    from planner.models.spec import ModelSpec
    from planner.setup.request import KnobValue, PlanRequest

# Stands in for planning where this machine has no GPU; the run is then on the CPU.
CARD_WITHOUT_GPU = "16GB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_request_arguments(parser)
    add_runs_option(parser)
    parser.add_argument(
        "--name", action=StoreOnce, type=run_name, help="name of the run folder (default: time and model)"
    )
    parser.add_argument(
        "--plan", action=StoreOnce, type=Path, metavar="FILE", help="launch the plan that plan -o saved"
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
        ("--max-steps", "train N steps whatever the epochs"),
        ("--seed", "seed of order, adapter and dropout (42)"),
    ):
        parser.add_argument(flag, action=StoreOnce, type=whole_number, metavar="N", help=text)
    add_saving(parser)
    add_nodes(parser)
    add_engine(parser)
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
    parser.add_argument("--full", action="store_true", help="print all that is known of the plan")
    parser.add_argument(
        "--wait",
        action="store_true",
        help="wait for the end of a run on the same GPU, and for memory that other processes hold",
    )
    add_knobs(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, start, follow, compare; the exit code is that of the run's end (ends.RUN_ENDS).

    Raises:
        InputError: what was asked cannot be planned or run.
        MissingExtraError: the training stack is not installed.
    """
    saved = None if args.plan is None else take_saved_plan(args)
    if args.data is None:
        raise InputError("the following arguments are required: --data")
    with sigterm_as_ctrl_c():
        return _plan_and_train(args, saved)


def _plan_and_train(args: argparse.Namespace, saved: Plan | None) -> int:
    root = runs_root(args.runs)
    if args.name is not None:
        refuse_taken(root, args.name)
    stack.require("train")
    require(args.track)
    from launcher.training import build

    if args.task is not None:
        build.refuse_task(args.task)
    on_gpu = _has_gpu()
    plan, wish, engine = _planned(args, saved, engine_asked(args, on_gpu=on_gpu), on_gpu=on_gpu)
    nodes = wish.nnodes
    if not on_gpu:
        say(f"no NVIDIA GPU here: planned for {plan.gpu.text}, trained on this machine's CPU")
    full = on_gpu and is_full(plan, nnodes=nodes)
    if full or not plan.fits:
        say("nothing was started")
        return ExitCode.DOES_NOT_FIT
    if engine is None:
        build.refuse_unsupported(plan.setup, on_gpu=on_gpu)
    else:
        say_of_engine(engine)
    if wish.eval_data is not None:
        _say_of_evaluation(dataclasses.replace(wish, data=wish.eval_data), plan)
    if engine is None:
        say(saving_in_words(wish, plan))
    if args.dry_run:
        return _dry_run(root, plan, wish, args.name)
    return _start_and_follow(root, plan, wish, args.name)


def _planned(
    args: argparse.Namespace, saved: Plan | None, engine: OtherEngine | None, *, on_gpu: bool
) -> tuple[Plan, JobWish, OtherEngine | None]:
    """The plan, made here or saved before, shown; what is asked beside it; and the engine, if it is taken.
    With --wait the plan is that of the moment in which the GPU has room for it.
    """
    if saved is None:
        # Of the settings the price alone: what is trained on is this machine's.
        _, _, args.price_per_hour = card_asked_for(
            args.gpu, display=args.display, price_per_hour=args.price_per_hour
        )
    if args.gpu is None and not on_gpu:
        args.gpu = CARD_WITHOUT_GPU
    request = request_from(args) if saved is None else saved.request
    nodes = nodes_wish(args)["nnodes"]
    if on_gpu:
        see_that_the_gpu_is_free(request, wait=args.wait, nnodes=nodes)
    model, source = _find_model(args)
    _find_data(args)
    request = dataclasses.replace(request, data=args.data)
    if not on_gpu and engine is None:
        knobs = {**_for_the_cpu(model), **request.fixed}
        request = dataclasses.replace(request, knobs=tuple(knobs.items()))
    wish = _wish(args, source)
    stats = _measured_stats(wish)
    if stats.images:
        from planner.planning.make_plan import with_images

        model = _with_tower(args, model)
        request, stats = with_images(request, model, stats)
    while True:
        plan, theirs = _engines_plan(args, saved, engine, request, model, stats, on_gpu=on_gpu)
        if not on_gpu:
            break
        waited = plan.fits and its_gpus_were_waited_for(plan, wait=args.wait, nnodes=nodes)
        if not waited and not (args.wait and waited_for_room(plan, nnodes=nodes)):
            break
        see_that_the_gpu_is_free(request, wait=True, nnodes=nodes)
    _show(plan, full=args.full)
    if theirs:
        wish = dataclasses.replace(wish, **wish_for(engine))
    return plan, wish, engine if theirs else None


def _engines_plan(
    args: argparse.Namespace,
    saved: Plan | None,
    engine: OtherEngine | None,
    request: PlanRequest,
    model: ModelSpec,
    stats: DatasetStats,
    *,
    on_gpu: bool,
) -> tuple[Plan, bool]:
    """The plan of who trains, and whether that is the other engine."""
    if engine is not None and args.engine == UNSLOTH:
        return plan_for_engine(request, model=model, stats=stats, on_gpu=on_gpu), True
    plan = _plan_of(args, saved, request, model, stats, on_gpu=on_gpu)
    if engine is None:
        return plan, False
    try:
        other = plan_for_engine(request, model=model, stats=stats, on_gpu=on_gpu)
    except InputError as error:
        say(f"Unsloth is not taken: {error}")
        return plan, False
    return (other, True) if taken(plan, other) else (plan, False)


def _plan_of(
    args: argparse.Namespace,
    saved: Plan | None,
    request: PlanRequest,
    model: ModelSpec,
    stats: DatasetStats,
    *,
    on_gpu: bool,
) -> Plan:
    from planner.planning.make_plan import make_plan

    if saved is None:
        return make_plan(request, model=model, stats=stats, whole=args.full)
    return plan_for_here(
        saved,
        name=args.model,
        model=model,
        stats=stats,
        data=args.data,
        on_gpu=on_gpu,
        nnodes=nodes_wish(args)["nnodes"],
    )


def _dry_run(root: Path, plan: Plan, wish: JobWish, name: str | None) -> int:
    """Say what would be started.

    Raises:
        InputError: there is no room for it.
    """
    from launcher.commands.dry_run import print_dry_run
    from launcher.runs.folder import planned_folder
    from launcher.runs.job import job_of, refuse_no_room
    from planner.text.figures import show

    job = job_of(plan, wish)
    refuse_no_room(root, plan, job)
    folder = planned_folder(root, job, name=name).absolute()
    show(lambda out: print_dry_run(out, plan, job, folder))
    return ExitCode.OK


def _find_data(args: argparse.Namespace) -> None:
    """Have data sets of the Hub named in full, and fetched where that is allowed."""
    from planner.data.files import on_this_machine

    args.data = on_this_machine(args.data, allow_network=args.allow_download)
    if args.eval_data is not None:
        args.eval_data = on_this_machine(args.eval_data, allow_network=args.allow_download)


def _has_gpu() -> bool:
    from planner.gpus.detect import NoGpuError, local_gpus

    try:
        return bool(local_gpus())
    except NoGpuError:
        return False


def _find_model(args: argparse.Namespace) -> tuple[ModelSpec, str]:
    """The model and where its weights are, which have to be there, or to be fetched, before it is described.

    Raises:
        InputError: the model is not known or not planned, or its weights are not on this machine.
    """
    from launcher.runs.job import model_source
    from launcher.runs.weights import require_weights
    from planner.models.catalog import resolve_model

    model = None
    # Describing a model that equals none of the catalog takes seconds.
    with contextlib.suppress(MissingExtraError):
        model = resolve_model(args.model, allow_network=args.allow_download)
    source = model_source(args.model, model)
    fetched = require_weights(
        source,
        download_bytes=None if model is None else model.download_bytes,
        allow_download=args.allow_download,
    )
    if model is None:
        model = resolve_model(args.model, allow_network=args.allow_download, inspector=args.inspector)
    if fetched is not None:
        say(fetched)
    return model, source


def _with_tower(args: argparse.Namespace, model: ModelSpec) -> ModelSpec:
    """The model with what looks at images."""
    from planner.models.catalog import resolve_model

    if model.tower is not None:
        return model
    return resolve_model(args.model, allow_network=args.allow_download, inspector=args.inspector, images=True)


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
        **saving_wish(args),
        **nodes_wish(args),
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
    images = None
    if data.has_images:
        from launcher.training.images.tokens import image_tokens

        images = image_tokens(wish.model_source, tokenizer, allow_download=wish.allow_download)
    return dataset.measure_stats(
        data, tokenizer, assistant_only_loss=wish.assistant_only_loss, split=split, images=images
    )


def _say_of_evaluation(wish: JobWish, plan: Plan) -> None:
    """Say what of the data of `wish` is not evaluated on: the plan tells it of the training data.

    Raises:
        InputError: nothing of it would be.
    """
    from planner.planning.schedule import summarise_data
    from planner.text.data import not_trained
    from planner.throughput.epoch import Examples

    lacking = not_trained(summarise_data(str(wish.data), Examples(_measured_stats(wish)), plan.setup))
    if lacking:
        say(f"evaluation data: {lacking}")


def _show(plan: Plan, *, full: bool) -> None:
    from planner.text.figures import show
    from planner.text.plan import print_plan
    from planner.text.short import print_short

    show(lambda out: print_plan(out, plan) if full else print_short(out, plan, starts=plan.fits))
    print(flush=True)


def _start_and_follow(root: Path, plan: Plan, wish: JobWish, name: str | None) -> int:
    """Signals are taken from before the start: a run that is started is followed, or told to end."""
    from launcher.commands.follow import finish, follow_to_the_end
    from launcher.commands.interrupts import Interrupts
    from launcher.runs import supervisor
    from launcher.runs.job import create_planned_run

    with Interrupts() as interrupts:
        folder = create_planned_run(root, plan, wish, name=name)
        handle = supervisor.start(folder.path)
        folder, left = follow_to_the_end(folder, interrupts, handle.goes_on, ends_run=True)
    if left is not None:
        return 128 + left
    return finish(folder, supervisor.status(folder.path), out=sys.stdout)
