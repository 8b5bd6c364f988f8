"""`vramwise tui`: size a setup by hand, start training, follow runs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.runs_folder import add_runs_option, command_for, runs_root
from planner.base import validate
from planner.base.errors import InputError, MissingExtraError, VramwiseError
from planner.base.settings import Session, card_asked_for, keep_session, load_session, load_settings

if TYPE_CHECKING:
    from planner.models.spec import ModelSpec
    from planner.setup.training_setup import TrainingSetup

DEFAULT_MODEL = "qwen2.5-14b"
DEFAULT_GPU = "16GB"
DEFAULT_PORT = 8000


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
    parser.add_argument(
        "--web", action="store_true", help="show it in a browser of this machine: prints the address to open"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"with --web: the port to serve on (default: {DEFAULT_PORT})"
    )


def run(args: argparse.Namespace) -> int:
    """Show the terminal interface until it is left; returns the exit code.

    Raises:
        InputError: no terminal, or an argument that names nothing.
        MissingExtraError: a browser is asked for, and what serves it is not installed.
    """
    if args.port is not None and not args.web:
        raise InputError("--port is of --web: in a terminal nothing is served")
    if args.web:
        return _serve(args)
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
    _refuse_no_run(args.run)

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


def _serve(args: argparse.Namespace) -> int:
    """Serve the interface to a browser until Ctrl-C.

    Raises:
        InputError: the port cannot be taken, or a folder is none of a run.
        MissingExtraError: what serves it is not installed.
    """
    port = validate.integer(
        "port", DEFAULT_PORT if args.port is None else args.port, minimum=1, maximum=65535
    )
    if importlib.util.find_spec("textual_serve") is None:
        raise MissingExtraError("--web", "textual-serve", "'vramwise[web]'")
    _refuse_no_run(args.run)
    from launcher.web.server import command_line, serve

    def opened(address: str) -> None:
        print(f"open {address}\nCtrl-C ends it; runs go on", flush=True)

    serve(command_line(_words(args)), port=port, opened=opened)
    return 0


def _words(args: argparse.Namespace) -> list[str]:
    """The arguments that the interface itself takes, for another process."""
    named = {
        "model": args.model,
        "gpu": args.gpu,
        "data": args.data or None,
        "runs": args.runs,
        "run": args.run,
    }
    words = [word for name, value in named.items() if value is not None for word in (f"--{name}", str(value))]
    return words + [
        f"--{name.replace('_', '-')}" for name in ("display", "allow_download") if vars(args)[name]
    ]


def _refuse_no_run(path: Path | None) -> None:
    if path is not None and not (path / "job.json").is_file():
        raise InputError(f"{path}: not a run folder (no job.json)")


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
