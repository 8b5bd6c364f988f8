"""Describe the shapes of a model with transformers: of a folder, or of the catalog's models anew."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from planner.base.errors import ExitCode, InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("ids", nargs="*", help="catalog models to describe anew")
    parser.add_argument("--all", action="store_true", help="describe every catalog model anew")
    parser.add_argument("--folder", type=Path, help="describe the model of a folder with config.json")
    parser.add_argument("--save", action="store_true", help="keep it, to be found by the folder's name")


def run(args: argparse.Namespace) -> int:
    """Describe and print.

    Raises:
        InputError: nothing was asked for, or too much, or a config is not usable.
        MissingExtraError: torch or transformers is not installed.
    """
    asked = [bool(args.ids), args.all, args.folder is not None]
    if sum(asked) != 1:
        raise InputError("give one of: catalog ids, --all, --folder FOLDER")
    if args.save and args.folder is None:
        raise InputError("--save goes with --folder")
    if args.folder is not None:
        from launcher.models.inspect import inspect_in_child
        from planner.base import data_files
        from planner.models import hub_config
        from planner.models.catalog import user_spec_path

        config = hub_config.read_config(args.folder)
        name = args.folder.resolve().name
        spec = inspect_in_child(config, model_id=name, hub_id=str(args.folder))
        text = json.dumps(spec.to_dict())
        if args.save:
            data_files.write_atomically(user_spec_path(name), text)
        print(text)
        return ExitCode.OK
    from launcher.models.write_catalog import write_catalog

    for line in write_catalog(None if args.all else args.ids):
        print(line)
    return ExitCode.OK
