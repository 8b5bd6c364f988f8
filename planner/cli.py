"""The planner's commands, and `plan` as a program of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from planner.commands.program import Command, run_as_program, run_command
from planner.models.inspectors import installed_inspector

_INSPECTING = (("inspector", installed_inspector),)
COMMANDS = {
    "plan": Command(
        "planner.commands.plan",
        "choose the fastest setup that fits a GPU, and say what it needs",
        _INSPECTING,
    ),
    "estimate": Command(
        "planner.commands.estimate", "memory and speed of given setups, one JSON line each", _INSPECTING
    ),
    "compare": Command("planner.commands.compare", "several models or GPUs in one table", _INSPECTING),
    "check": Command(
        "planner.commands.check", "figures that others state: possible, tight or beyond the card", _INSPECTING
    ),
    "check-setup": Command(
        "planner.commands.check_setup", "whether configs and setups fit a card, for hooks and CI", _INSPECTING
    ),
    "gpus": Command("planner.commands.gpus", "the GPUs of the catalog and of this machine"),
    "models": Command("planner.commands.models", "the models of the catalog"),
    "records": Command("planner.commands.records", "measured runs for others: write yours, or check a file"),
    "schema": Command("planner.commands.schema", "the JSON Schema of what a command prints as JSON"),
    "config": Command("planner.commands.config", "settings that are taken where nothing is told"),
    "accuracy": Command("planner.commands.accuracy", "how far the predictions are from measured runs"),
}


def plan_main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `plan`, the same as `vramwise plan`."""
    arguments = sys.argv[1:] if argv is None else argv
    run_as_program("plan", lambda: run_command("plan", COMMANDS["plan"], arguments))


if __name__ == "__main__":
    plan_main()
