"""`vramwise`: the planner's commands and the launcher's, each imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from planner import cli as planner_cli
from planner.commands.program import Command, run_as_program, run_command, run_commands

if TYPE_CHECKING:
    from planner.models.spec import ModelSpec

PROGRAM = "vramwise"
DESCRIPTION = "Plan the memory and speed of LLM fine-tuning on a GPU, then launch exactly that run."


def inspector(config: Mapping[str, Any], *, model_id: str, hub_id: str) -> ModelSpec:
    """Describe a model outside the catalog, in a process of its own.

    Raises:
        InputError: transformers cannot build it.
        MissingExtraError: the training stack is not installed.
    """
    from launcher.models.inspect import inspect_in_child

    return inspect_in_child(config, model_id=model_id, hub_id=hub_id)


def _with_inspector(command: Command) -> Command:
    return Command(command.module, command.help, (*command.defaults, ("inspector", inspector)))


COMMANDS = {
    **{name: _with_inspector(command) for name, command in planner_cli.COMMANDS.items()},
    "train": _with_inspector(Command("launcher.commands.train", "plan a run, start it and follow it")),
    "demo": _with_inspector(Command("launcher.commands.demo", "train the demo model on whatever is here")),
    "merge": Command(
        "launcher.commands.merge", "merge a trained adapter into one 16-bit model, and measure it"
    ),
    "runs": Command("launcher.commands.runs", "list runs; show, follow, stop, resume or delete one"),
    "calibrate": Command("launcher.commands.calibrate", "measure this GPU, and plan by what it shows"),
    "doctor": Command("launcher.doctor.command", "what of this machine a training needs, and what to type"),
    "tui": Command("launcher.commands.tui", "size setups and watch runs in the terminal"),
}
COMMANDS["completion"] = Command(
    "planner.commands.completion",
    "print what makes a shell complete commands, options and names",
    (("program", PROGRAM), ("commands", lambda: COMMANDS)),
)
# A word behind a command that makes it another one.
SUBCOMMANDS = {
    ("models", "inspect"): Command(
        "launcher.commands.inspect", "describe a model's shapes with transformers"
    ),
}


def run(argv: Sequence[str]) -> int:
    """Run the command that the arguments name.

    Raises:
        VramwiseError: anything that a person can mend.
    """
    sub = SUBCOMMANDS.get((argv[0], argv[1])) if len(argv) > 1 else None
    if sub is not None:
        return run_command(f"{PROGRAM} {argv[0]} {argv[1]}", sub, argv[2:])
    return run_commands(PROGRAM, DESCRIPTION, COMMANDS, argv)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `vramwise`."""
    arguments = sys.argv[1:] if argv is None else argv
    run_as_program(PROGRAM, lambda: run(arguments))


if __name__ == "__main__":
    main()
