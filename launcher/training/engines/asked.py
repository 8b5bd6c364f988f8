"""`vramwise train --engine`: another trainer in an environment of its own, planned with its stack."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.runs.training_job import ENGINES, OWN_ENGINE
from planner.answers.plan import Plan
from planner.base.errors import InputError
from planner.base.settings import load_settings
from planner.commands.program import StoreOnce, say
from planner.text.figures import rate

if TYPE_CHECKING:
    from planner.data.lengths import DatasetStats
    from planner.models.spec import ModelSpec
    from planner.setup.request import PlanRequest

UNSLOTH = "unsloth"
NEEDED = ("unsloth", "unsloth_zoo", "trl", "transformers", "torch", "datasets")
ANSWER_SECONDS = 60.0
_ASK = (
    "import json, sys; from importlib import metadata; found = {}\n"
    "for name in sys.argv[1:]:\n"
    "    try: found[name] = metadata.version(name)\n"
    "    except metadata.PackageNotFoundError: pass\n"
    "print(json.dumps(found))"
)
_NOT_THERE = {
    "plan": "--plan",
    "eval_data": "--eval-data",
    "eval_split": "--eval-split",
    "nnodes": "--nnodes",
    "save_steps": "--save-steps",
    "save_minutes": "--save-minutes",
}
"""What Unsloth is not started with: argument and option."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherEngine:
    """Unsloth: the interpreter of its environment, and which releases are there."""

    python: str
    versions: Mapping[str, str]


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("who trains")
    group.add_argument(
        "--engine",
        action=StoreOnce,
        choices=ENGINES,
        help="trl: this program's own trainer; unsloth: Unsloth in an environment of its own (default: "
        "whichever is forecast to be done first, where --unsloth-python or the setting says where it is)",
    )
    group.add_argument(
        "--unsloth-python",
        action=StoreOnce,
        metavar="FILE",
        help="the Python of the environment that Unsloth is installed in (setting: unsloth_python)",
    )


def engine_asked(args: argparse.Namespace, *, on_gpu: bool) -> OtherEngine | None:
    """The other engine, where it is asked for or may be taken; None: our own trains, as it does unasked
    wherever there is no GPU.

    Raises:
        InputError: it is asked for and is not there, or cannot do what else is asked.
    """
    if args.engine == OWN_ENGINE:
        return None
    python = args.unsloth_python or load_settings().unsloth_python
    if args.engine is None and (python is None or not on_gpu):
        return None
    asked = [option for name, option in _NOT_THERE.items() if getattr(args, name) is not None]
    asked += ["--track"] if args.track else []
    if asked and args.engine is None:
        return None
    if asked:
        told = ", ".join(asked)
        raise InputError(f"--engine {UNSLOTH} cannot do {told}: leave it out, or --engine {OWN_ENGINE}")
    if python is None:
        raise InputError(
            f"--engine {UNSLOTH} needs --unsloth-python: the Python of an environment made with: {_install()}"
        )
    place = str(Path(python).expanduser().absolute())
    return OtherEngine(python=place, versions=_versions(place))


def _versions(python: str) -> dict[str, str]:
    """The releases in an environment, none of which is imported.

    Raises:
        InputError: the interpreter cannot be run, or a package that is needed is not there.
    """
    try:
        asked = subprocess.run(  # noqa: S603 (the interpreter that a person named, no shell)
            [python, "-I", "-c", _ASK, *NEEDED],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=True,
        )
        found: dict[str, str] = json.loads(asked.stdout)
    except OSError as error:
        raise InputError(f"--unsloth-python: {python} cannot be run ({error.strerror})") from error
    except (subprocess.SubprocessError, ValueError) as error:
        raise InputError(f"--unsloth-python: {python} is no Python that answers") from error
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise InputError(
            f"--unsloth-python: {', '.join(missing)} is not installed for {python}; "
            f"an environment with it is made with: {_install()}"
        )
    return found


def _install() -> str:
    from planner.trainers.unsloth import INSTALL

    return INSTALL


def plan_for_engine(
    request: PlanRequest,
    *,
    model: ModelSpec,
    stats: DatasetStats,
    on_gpu: bool,
) -> Plan:
    """The plan of a request for Unsloth, with its stack.

    Raises:
        InputError: it has not what is asked for.
    """
    from planner.trainers.files import TRAINERS
    from planner.trainers.planned import plan_for, refuse_for

    if not on_gpu:
        request = request.with_knobs({"activation_offloading": False, **request.fixed})
    refuse_for(TRAINERS[UNSLOTH], request)
    return plan_for(TRAINERS[UNSLOTH], request, stats=stats, model=model)


def taken(own: Plan, theirs: Plan) -> bool:
    """Whether Unsloth's plan is taken by itself, said with the figures of both: where it trains longer
    sequences, or as long ones faster, or ours does not fit. Its own compilation at the start is not known.
    """
    better = _order(theirs) < _order(own)
    say(
        f"Unsloth is forecast at {_speed(theirs)}, this program's own trainer at {_speed(own)}: "
        f"{'Unsloth' if better else 'the latter'} is taken "
        f"(--engine {OWN_ENGINE if better else UNSLOTH} for the other)"
    )
    return better


def _order(plan: Plan) -> tuple[bool, int, float]:
    """By which two plans are ordered, the one to take first."""
    if not plan.fits:
        return True, 0, 0.0
    duration, speed = plan.duration, plan.speed
    if duration is not None and duration.steps is not None:
        return False, -plan.setup.max_length, duration.hours
    return False, -plan.setup.max_length, math.inf if speed is None else -speed.tokens_per_second


def _speed(plan: Plan) -> str:
    if not plan.fits:
        return "no fit"
    speed = plan.speed
    if speed is None:
        return "no known speed"
    return f"{rate(speed.tokens_per_second)} tokens/s ({plan.setup.max_length:,} tokens long)"


def say_of_engine(engine: OtherEngine) -> None:
    """Who trains, and what is otherwise than with our own."""
    from planner.trainers.unsloth import VERSION

    here = engine.versions[UNSLOTH]
    releases = ", ".join(f"{name} {engine.versions[name]}" for name in ("torch", "transformers", "trl"))
    say(f"trained by Unsloth {here} ({releases}) of {engine.python}; no checkpoints are saved")
    if here != VERSION:
        say(f"its memory is counted for {VERSION}: another release may need more")
    say("its memory is counted as of TRL's layers: an upper bound (docs/other-trainers.md)")


def wish_for(engine: OtherEngine | None) -> dict[str, Any]:
    """What of a JobWish follows from the engine."""
    if engine is None:
        return {}
    return {"engine": UNSLOTH, "engine_python": engine.python, "checkpoints": False}
