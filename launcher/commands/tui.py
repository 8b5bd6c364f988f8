"""`vramwise tui`: size a setup by hand, start training, follow runs."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.runs_folder import add_runs_option, command_for, runs_root
from planner.base.errors import InputError, VramwiseError
from planner.base.settings import Session, card_asked_for, keep_session, load_session, load_settings

if TYPE_CHECKING:
    from planner.models.spec import ModelSpec
    from planner.setup.training_setup import TrainingSetup

DEFAULT_MODEL = "qwen2.5-14b"
DEFAULT_GPU = "16GB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "--model",
        help="model to begin with: catalog name, Hub id or folder (default: that of the last time, at first "
        f"{DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--gpu",
        help=f"GPU to begin with (default: the setting, else this machine's, or {DEFAULT_GPU} where there is "
        "none)",
    )
    parser.add_argument("--display", action="store_true", help="a display is attached to the GPU")
    parser.add_argument(
        "--data", default="", help="training data to size with and to train on, as plan takes it"
    )
    add_runs_option(parser)
    parser.add_argument("--run", type=Path, help="run folder to follow")
    parser.add_argument(
        "--allow-download",
        action="store_true",
        help="what a run needs and is not on this machine may be fetched from the Hugging Face Hub",
    )


def run(args: argparse.Namespace) -> int:
    """Show the terminal interface until it is left; returns the exit code.

    Raises:
        InputError: no terminal, or an argument that names nothing.
    """
    # A server that shows Textual applications in a browser names the driver through which it talks to them.
    served = bool(os.environ.get("TEXTUAL_DRIVER"))
    if not (served or (sys.stdin.isatty() and sys.stdout.isatty())):
        raise InputError("tui needs a terminal; use plan and train in scripts")
    # Textual is imported by this command alone: the others start without it.
    from launcher.runs.folder import RunFolder
    from launcher.tui.app import VramwiseApp
    from launcher.tui.cards import first_card
    from launcher.tui.pauses import shorten_pauses
    from launcher.tui.screens.reading import Opening
    from launcher.tui.text import plain
    from planner.models.catalog import catalog_ids

    kept = load_settings()
    gpu, display, price = card_asked_for(args.gpu, display=args.display, price_per_hour=None)
    card = first_card(gpu, DEFAULT_GPU, display=display)
    if args.run is not None and not (args.run / "job.json").is_file():
        raise InputError(f"{args.run}: not a run folder (no job.json)")

    opened = partial(_opened, args, card.spec.dtype)
    wished = args.model or load_session().model or DEFAULT_MODEL
    # A model of the catalog is there at once, another takes seconds, in which the screen says what is done.
    known = wished in catalog_ids()
    model, setup = opened() if known else (None, None)
    app = VramwiseApp(
        model=model,
        setup=setup,
        opening=None if known else Opening(name=wished, read=opened),
        card=card,
        automatic=True,
        runs_root=runs_root(args.runs),
        run=None if args.run is None else RunFolder(args.run.resolve()),
        data=args.data,
        allow_download=args.allow_download,
        price=price,
        theme=kept.theme,
        keeps=True,
    )
    shorten_pauses()
    app.run()
    if app.refusal:
        raise InputError(app.refusal)
    if app.model_name is not None:
        keep_session(Session(model=app.model_name))
    for folder in app.runs_that_go_on():
        # Not on stdout, which a server reads.
        again = command_for("follow", folder)
        print(f"run {plain(folder.path.name, 100)} goes on: {plain(again)}", file=sys.stderr)
    return app.return_code or 0


def _opened(args: argparse.Namespace, dtype: str) -> tuple[ModelSpec, TrainingSetup]:
    """The first model and a setup of it, which may take seconds.

    Raises:
        InputError: what is asked for is no model.
    """
    from planner.setup.defaults import DEFAULT_LENGTHS, OPTIM
    from planner.setup.request import DEFAULT_EFFECTIVE_BATCH_SIZE
    from planner.setup.training_setup import TrainingSetup

    name, model = _first_model(args)
    return model, TrainingSetup(
        model=name,
        max_length=min(DEFAULT_LENGTHS[0], model.max_position_embeddings),
        gradient_accumulation_steps=DEFAULT_EFFECTIVE_BATCH_SIZE,
        dtype=dtype,
        optim=OPTIM,
    )


def _first_model(args: argparse.Namespace) -> tuple[str, ModelSpec]:
    """The model that is asked for; else that of the last time, as long as it is there; else the usual one.

    Raises:
        InputError: what is asked for is none.
    """
    from launcher.tui.inspection import inspector
    from planner.models.catalog import resolve_model

    def resolved(name: str) -> ModelSpec:
        return resolve_model(name, allow_network=args.allow_download, inspector=inspector)

    if args.model is not None:
        return args.model, resolved(args.model)
    last = load_session().model
    if last is not None:
        try:
            return last, resolved(last)
        except VramwiseError:
            pass
    return DEFAULT_MODEL, resolved(DEFAULT_MODEL)
