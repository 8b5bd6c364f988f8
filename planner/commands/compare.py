"""Compare models and GPUs, or find the smallest card for a model, or the largest models for a card.

Several --model and --gpu: each model planned on each GPU, with --data for these examples. --model alone: the
smallest card by method. --gpu alone: the catalog's models that fit, and the longest length of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from planner.base.errors import ExitCode, InputError
from planner.base.spread import usable_processes
from planner.commands.knobs import add_knobs, given_knobs
from planner.commands.plan import add_data_arguments
from planner.commands.program import StoreOnce, progress
from planner.setup.request import DEFAULT_EFFECTIVE_BATCH_SIZE, PlanRequest
from planner.setup.training_setup import METHODS

MAX_PAIRS = 400
# Stands in where the model is every one of the catalog.
_ANY_MODEL = "any"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `compare`."""
    parser.add_argument(
        "--model", action="append", default=[], help="catalog name, Hub id or folder; may be repeated"
    )
    parser.add_argument(
        "--gpu", action="append", default=[], help="16GB, rtx-4090, 2x24GB ...; may be repeated"
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--price-per-hour", action=StoreOnce, type=float, metavar="USD", help="price of one GPU"
    )
    parser.add_argument("--display", action="store_true", help="a display is attached to the GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--allow-download",
        action="store_true",
        help="the config of a model that is not on this machine may be fetched from the Hugging Face Hub",
    )
    add_knobs(parser)


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    if not args.model and not args.gpu:
        raise InputError("compare needs --model, --gpu or both")
    if args.model and args.gpu:
        return _pairs(args)
    for name in ("data", "effective_batch_size", "epochs"):
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{option} is for plans: compare takes it where both --model and --gpu are given"
            )
    if len(args.model) > 1:
        raise InputError("several --model need at least one --gpu")
    if len(args.gpu) > 1:
        raise InputError("several --gpu need at least one --model")
    if args.model:
        return _smallest_cards(args)
    return _largest_models(args)


def _request(args: argparse.Namespace, model: str, gpu: str | None) -> PlanRequest:
    return PlanRequest(
        model=model,
        gpu=gpu,
        data=args.data,
        knobs=given_knobs(args),
        effective_batch_size=args.effective_batch_size,
        num_train_epochs=args.epochs,
        price_usd_per_hour=args.price_per_hour,
        display=args.display,
    )


def _pairs(args: argparse.Namespace) -> int:
    from planner.models.catalog import resolve_model
    from planner.planning.comparison import row_of
    from planner.planning.make_plan import make_plan, read_stats

    if len(args.model) * len(args.gpu) > MAX_PAIRS:
        raise InputError(f"at most {MAX_PAIRS} pairs of --model and --gpu are compared at once")
    inspector = getattr(args, "inspector", None)
    stats = None
    if args.data is not None:
        from planner.data.files import on_this_machine

        args.data = on_this_machine(args.data, allow_network=args.allow_download)
        stats = read_stats(args.data)
    rows = []
    for name in args.model:
        model = resolve_model(name, allow_network=args.allow_download, inspector=inspector)
        requests = [_request(args, name, gpu) for gpu in args.gpu]
        rows += [row_of(make_plan(request, model=model, stats=stats, whole=False)) for request in requests]
    if args.json:
        return _print_json("rows", rows)
    from planner.text.figures import show
    from planner.text.tables import print_rows

    show(lambda out: print_rows(out, rows))
    return ExitCode.OK


def _smallest_cards(args: argparse.Namespace) -> int:
    from planner.gpus.spec import DISPLAY_BYTES
    from planner.models.catalog import resolve_model
    from planner.planning.comparison import smallest_cards
    from planner.setup.methods import as_stored_request

    name = args.model[0]
    request = _request(args, name, None)
    model = resolve_model(name, allow_network=args.allow_download, inspector=getattr(args, "inspector", None))
    request = as_stored_request(request, model)
    methods = METHODS if model.checkpoint is None else ("qlora",)
    methods = methods if args.method is None else (args.method,)
    base = request.setup(
        max_length=min(512, model.max_position_embeddings),
        gradient_accumulation_steps=DEFAULT_EFFECTIVE_BATCH_SIZE,
    )
    cards = smallest_cards(
        base,
        model,
        methods,
        fixed=request.fixed,
        given_length=args.max_length,
        held_bytes=DISPLAY_BYTES if args.display else 0,
    )
    if args.json:
        return _print_json("smallest_cards", cards)
    from planner.text.figures import show
    from planner.text.tables import print_smallest_cards

    show(lambda out: print_smallest_cards(out, name, cards))
    return ExitCode.OK


def _largest_models(args: argparse.Namespace) -> int:
    from planner.gpus.target import resolve_gpu
    from planner.planning.comparison import largest_models
    from planner.text.tables import SHOWN_MODELS, print_largest_models

    if args.max_length is not None:
        raise InputError("--gpu alone looks for the longest length; --max-length needs --model too")
    target = resolve_gpu(args.gpu[0], display=args.display)
    request = _request(args, _ANY_MODEL, None)
    base = request.setup(
        max_length=512,
        gradient_accumulation_steps=DEFAULT_EFFECTIVE_BATCH_SIZE,
        dtype=target.spec.dtype,
    )
    found = largest_models(
        target,
        base,
        fixed=request.fixed,
        most=None if args.json else SHOWN_MODELS,
        processes=usable_processes(),
        progress=progress("models looked at"),
    )
    if args.json:
        return _print_json("models", found.models)
    from planner.text.figures import show

    show(lambda out: print_largest_models(out, target, base.method, found))
    return ExitCode.OK


def _print_json(name: str, rows: Sequence[Any]) -> int:
    from planner.base.json_codec import encode

    json.dump({"version": 1, name: [encode(row) for row in rows]}, sys.stdout, indent=2, allow_nan=False)
    print()
    return ExitCode.OK
