"""Choose the fastest setup that fits on a GPU, and say what it needs, how fast it is and how sure that is.

Exit code 0 when something fits, 3 when nothing does, 2 on bad input.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from planner.answers.plan import Plan
from planner.base.errors import ExitCode, InputError
from planner.base.settings import card_asked_for
from planner.base.spread import usable_processes
from planner.commands.knobs import add_knobs, given_knobs
from planner.commands.program import StoreOnce, real_number, say, whole_number
from planner.setup.request import PlanRequest
from planner.trainers.names import JOB_SERVICES, TRAINER_NAMES

if TYPE_CHECKING:
    from planner.data.lengths import DatasetStats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `plan`."""
    add_request_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    parser.add_argument(
        "-o",
        "--output",
        action=StoreOnce,
        type=Path,
        metavar="FILE",
        help="save the plan, for train --plan: the JSON of --json; with --for or --job a folder",
    )
    parser.add_argument(
        "--for",
        dest="trainer",
        action=StoreOnce,
        choices=TRAINER_NAMES,
        metavar="TRAINER",
        help=f"plan for another trainer, and write its config into -o DIR: {', '.join(TRAINER_NAMES)}",
    )
    parser.add_argument(
        "--job",
        action=StoreOnce,
        choices=JOB_SERVICES,
        metavar="SERVICE",
        help="write the plan and a job that rents the card and trains it, into -o DIR: sky, dstack",
    )
    parser.add_argument(
        "--from",
        dest="config",
        action=StoreOnce,
        type=Path,
        metavar="FILE",
        help="plan what a config of such a trainer trains (YAML)",
    )
    parser.add_argument(
        "--longest",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="say how long sequences may be, and how fast they are then (default)",
    )
    parser.add_argument("--full", action="store_true", help="print all that is known of it")
    parser.add_argument("--explain", action="store_true", help="--full, and where each figure comes from")
    add_knobs(parser)


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what a PlanRequest holds beside the knobs."""
    parser.usage = "%(prog)s MODEL [GPU] [OPTIONS]"
    parser.add_argument("model", nargs="?", action=StoreOnce, metavar="MODEL", help="as --model")
    parser.add_argument("gpu", nargs="?", action=StoreOnce, metavar="GPU", help="as --gpu")
    parser.add_argument("--model", action=StoreOnce, help="catalog name, Hub id, or folder with config.json")
    parser.add_argument(
        "--gpu", action=StoreOnce, help="16GB, rtx-4090, 2x24GB ... (default: this machine's GPUs)"
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--learning-rate", action=StoreOnce, type=real_number, metavar="X", help="(default: by model size)"
    )
    parser.add_argument(
        "--price-per-hour", action=StoreOnce, type=real_number, metavar="USD", help="price of one GPU"
    )
    parser.add_argument("--display", action="store_true", help="a display is attached to the GPU")
    parser.add_argument(
        "--allow-8bit",
        action="store_true",
        help="products with the frozen base may be in 8 bits, if faster (docs/eight-bit.md)",
    )
    parser.add_argument(
        "--allow-download",
        action="store_true",
        help="a model or data set that is not on this machine may be fetched from the Hugging Face Hub",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the examples and how often, how many at a time, they are gone through."""
    parser.add_argument(
        "--data",
        action=StoreOnce,
        metavar="FILE",
        help="training examples: a file, a folder, or ORG/NAME of the Hub (docs/data.md)",
    )
    parser.add_argument(
        "--effective-batch-size",
        action=StoreOnce,
        type=whole_number,
        metavar="N",
        help="sequences of one optimizer step (default: 16)",
    )
    parser.add_argument(
        "--epochs", action=StoreOnce, type=real_number, metavar="X", help="passes over the data (default: 3)"
    )


def request_from(args: argparse.Namespace) -> PlanRequest:
    """Build the request.

    Raises:
        InputError: a value that is not accepted, or two that contradict each other.
    """
    if args.model is None:
        raise InputError(
            "name a model, for example: plan llama-3.1-8b 12GB (list them with: vramwise models)"
        )
    return PlanRequest(
        model=args.model,
        gpu=args.gpu,
        data=args.data,
        knobs=given_knobs(args),
        effective_batch_size=args.effective_batch_size,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        price_usd_per_hour=args.price_per_hour,
        display=args.display,
        allow_8bit=args.allow_8bit,
    )


def plan_from(args: argparse.Namespace) -> Plan:
    """Make the plan that the arguments ask for.

    Raises:
        InputError: see planner.planning.make_plan.make_plan.
    """
    from planner.planning.make_plan import make_plan, read_stats

    stats = None
    args.gpu, args.display, args.price_per_hour = card_asked_for(
        args.gpu, display=args.display, price_per_hour=args.price_per_hour
    )
    if args.data is not None:
        from planner.data.files import on_this_machine

        args.data = on_this_machine(args.data, allow_network=args.allow_download)
        stats = read_stats(args.data)
    request = _request_with_config(args)
    if getattr(args, "trainer", None) is not None:
        return _plan_for_trainer(args, request, stats)
    return make_plan(
        request,
        stats=stats,
        allow_network=args.allow_download,
        inspector=getattr(args, "inspector", None),
        longest=args.longest,
        whole=args.full or args.explain or args.json or (args.output is not None and args.job is None),
        processes=usable_processes(),
    )


def _request_with_config(args: argparse.Namespace) -> PlanRequest:
    """The request, with what a trainer's config asks for where one is given."""
    path = getattr(args, "config", None)
    if path is None:
        return request_from(args)
    from planner.gpus.target import resolve_gpu
    from planner.trainers.files import read_config
    from planner.trainers.planned import request_of

    config = read_config(path, resolve_gpu(args.gpu, display=args.display))
    args.model = args.model or config.setup.model
    if config.unused:
        say(f"settings of the config that were not used: {', '.join(config.unused)}")
    return request_of(config, request_from(args))


def _plan_for_trainer(args: argparse.Namespace, request: PlanRequest, stats: DatasetStats | None) -> Plan:
    from planner.trainers.files import TRAINERS
    from planner.trainers.planned import plan_for, refuse_for

    trainer = TRAINERS[args.trainer]
    if args.output is None:
        raise InputError("plan --for writes a config: name the folder for it with -o DIR")
    if args.job is not None:
        raise InputError("--for and --job exclude each other: a job runs vramwise train")
    refuse_for(trainer, request)
    return plan_for(
        trainer,
        request,
        stats=stats,
        allow_network=args.allow_download,
        inspector=getattr(args, "inspector", None),
    )


def _write_for_trainer(plan: Plan, name: str, folder: Path) -> None:
    """Write a trainer's files where the plan fits, and say how to start it."""
    from planner.trainers.files import TRAINERS
    from planner.trainers.written import start_of, write_files

    if not plan.fits:
        say("nothing was written: the plan does not fit")
        return
    trainer = TRAINERS[name]
    for path in write_files(trainer, plan, folder):
        say(f"written: {path}")
    say(f"install {trainer.title}: {trainer.install}")
    say(f"start it there: {start_of(trainer, plan.setup)}")


def _write_job(plan: Plan, service: str, folder: Path | None) -> None:
    """Write the plan with a job that rents its card, and say how to start it."""
    from planner.jobs.written import start_of, write_job

    if folder is None:
        raise InputError("plan --job writes files: name the folder for them with -o DIR")
    for path in write_job(plan, service, folder.expanduser()):
        say(f"written: {path}")
    say(f"start it there: {start_of(service)}")


def _as_json(plan: Plan) -> str:
    import json

    from planner.planning.made_with import to_keep

    return json.dumps(to_keep(plan).to_dict(), indent=2, allow_nan=False)


def _save(plan: Plan, path: Path) -> None:
    """Write the plan, whole or not at all.

    Raises:
        InputError: it cannot be written there.
    """
    from planner.base.data_files import write_atomically

    try:
        write_atomically(path, _as_json(plan) + "\n")
    except OSError as error:
        raise InputError(f"{path}: the plan cannot be written ({error.strerror})") from error


def run(args: argparse.Namespace) -> int:
    """Plan, save where that is asked for, and print."""
    plan = plan_from(args)
    if args.trainer is not None:
        _write_for_trainer(plan, args.trainer, args.output.expanduser())
    elif args.job is not None:
        _write_job(plan, args.job, args.output)
    elif args.output is not None:
        _save(plan, args.output.expanduser())
    if args.json:
        print(_as_json(plan))
    else:
        from planner.text.figures import show, show_page
        from planner.text.plan import print_plan
        from planner.text.short import print_short

        if args.full or args.explain:
            show(lambda out: print_plan(out, plan, explain=args.explain))
        else:
            show_page(lambda out: print_short(out, plan))
    return ExitCode.OK if plan.fits else ExitCode.DOES_NOT_FIT
