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
from launcher.commands.runs_folder import add_runs_option, refuse_taken, run_name, runs_root
from launcher.commands.saving import add_saving, saving_in_words, saving_wish
from launcher.runs import stack
from planner.answers.plan import Plan
from planner.base.errors import ExitCode, InputError, MissingExtraError
from planner.commands.knobs import add_knobs
from planner.commands.plan import add_request_arguments, request_from
from planner.commands.program import StoreOnce, say, whole_number

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
    parser.add_argument("--eval-data", action=StoreOnce, metavar="FILE", help="examples to evaluate on")
    for flag, text in (
        ("--eval-steps", "evaluate every N steps"),
        ("--max-steps", "train N steps whatever the epochs"),
        ("--seed", "seed of order, adapter and dropout (42)"),
    ):
        parser.add_argument(flag, action=StoreOnce, type=whole_number, metavar="N", help=text)
    add_saving(parser)
    parser.add_argument("--assistant-only-loss", action="store_true", help="learn the assistant's turns only")
    parser.add_argument("--full", action="store_true", help="print all that is known of the plan")
    parser.add_argument("--wait", action="store_true", help="wait for the end of a run on the same GPU")
    add_knobs(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, start, follow, compare; the exit code is that of the run's end (ends.RUN_ENDS).

    Raises:
        InputError: what was asked cannot be planned or run.
        MissingExtraError: the training stack is not installed.
    """
    if args.data is None:
        raise InputError("the following arguments are required: --data")
    with sigterm_as_ctrl_c():
        return _plan_and_train(args)


def _plan_and_train(args: argparse.Namespace) -> int:
    root = runs_root(args.runs)
    if args.name is not None:
        refuse_taken(root, args.name)
    stack.require("train")
    from planner.planning.make_plan import make_plan

    on_gpu = _has_gpu()
    if args.gpu is None and not on_gpu:
        args.gpu = CARD_WITHOUT_GPU
    request = request_from(args)
    if on_gpu:
        _see_that_the_gpu_is_free(request, wait=args.wait)
    model, source = _find_model(args)
    _find_data(args)
    request = dataclasses.replace(request, data=args.data)
    if not on_gpu:
        knobs = {**_for_the_cpu(model), **request.fixed}
        request = dataclasses.replace(request, knobs=tuple(knobs.items()))
    wish = _wish(args, source)
    stats = _measured_stats(wish)
    plan = make_plan(request, model=model, stats=stats, whole=args.full)
    _show(plan, full=args.full)
    if not on_gpu:
        say(f"no NVIDIA GPU here: planned for {request.gpu}, trained on this machine's CPU")
    if not plan.fits:
        say("nothing was started")
        return ExitCode.DOES_NOT_FIT

    from launcher.training import build

    build.refuse_unsupported(plan.setup, on_gpu=on_gpu)
    if wish.eval_data is not None:
        _say_of_evaluation(dataclasses.replace(wish, data=wish.eval_data), plan)
    say(saving_in_words(wish, plan))
    return _start_and_follow(root, plan, wish, args.name)


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


def _see_that_the_gpu_is_free(request: PlanRequest, *, wait: bool) -> None:
    """Before planning, which counts what others hold of the GPU.

    Raises:
        GpuBusyError: another run trains on it, and nobody wants to wait.
    """
    from launcher.runs.minding import gpu_lock
    from planner.gpus.target import resolve_gpu

    uuid = gpu_lock.gpu_at(resolve_gpu(request.gpu, display=request.display).position or 0)
    if uuid is None:
        return
    if wait:
        gpu_lock.wait_for_gpu(uuid, say)
    else:
        gpu_lock.refuse_busy_gpu(uuid)


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
        max_steps=args.max_steps,
        **saving_wish(args),
        eval_steps=args.eval_steps,
        seed=args.seed,
        assistant_only_loss=args.assistant_only_loss,
        allow_download=args.allow_download,
    )


def _measured_stats(wish: JobWish) -> DatasetStats:
    """Lengths of the data as the model's own tokenizer makes them."""
    from launcher.training import build, dataset

    data = dataset.read_dataset(wish.data)
    tokenizer = build.load_tokenizer(wish.model_source, allow_download=wish.allow_download)
    return dataset.measure_stats(data, tokenizer, assistant_only_loss=wish.assistant_only_loss)


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
    from launcher.commands.follow import RunView, finish
    from launcher.commands.interrupts import Interrupts
    from launcher.runs import supervisor
    from launcher.runs.job import create_planned_run

    with Interrupts() as interrupts:
        folder = create_planned_run(root, plan, wish, name=name)
        handle = supervisor.start(folder.path)
        left = RunView(folder, interrupts, handle.goes_on, ends_run=True).show()
    if left is not None:
        return 128 + left
    return finish(folder, supervisor.status(folder.path), plan, out=sys.stdout)
