"""The command line and the request that are equal to what the sizing screen shows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from launcher.tui.cards import Card
from launcher.tui.sizing import Sizing, Wishes
from planner.search.strategies import PLAIN
from planner.setup import defaults
from planner.setup.options import option
from planner.setup.request import DEFAULT_EFFECTIVE_BATCH_SIZE, PlanRequest, make_request
from planner.setup.training_setup import TrainingSetup

_CHOSEN_OTHERWISE = (
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "gradient_checkpointing",
    "compile",
    "packing",
    "train_sampling_strategy",
)
"""What `plan` chooses where it is not told."""


_SHARING = ("num_processes", "distributed")
"""What `plan` chooses where there are several cards."""
_OPTIMIZERS = (defaults.OPTIM, defaults.FASTER_OPTIM)
"""Those between which a search chooses."""


def request_of(sizing: Sizing, **wishes: Any) -> PlanRequest:
    """The request of exactly the sizing's setup and card: every knob that has a value is fixed.

    Raises:
        InputError: a wish that is not accepted.
    """
    setup = sizing.setup
    fixed = {name: value for name, value in setup.to_dict().items() if name != "model" and value is not None}
    if setup.packing:
        # Null is the model's own attention; with packing a plan would choose.
        fixed.setdefault("attn_implementation", sizing.model.default_attn_implementation)
    asked = asked_of(sizing.card, sizing.wishes)
    return make_request(setup.model, knobs=fixed, **{**asked, **wishes})


def open_request(sizing: Sizing) -> PlanRequest:
    """The request that leaves open all that `plan` chooses by itself: fixed are the sizing's model, card,
    method, adapter and effective batch, and what else was changed that no search changes.

    Raises:
        InputError: the knobs contradict each other.
    """
    setup, card = sizing.searched_from, sizing.card
    usual = TrainingSetup(model=setup.model, max_length=setup.max_length, dtype=card.spec.dtype).to_dict()
    chosen = {*_CHOSEN_OTHERWISE, *_SHARING, *PLAIN, "experts"}
    if setup.packing:
        chosen.add("attn_implementation")
    if setup.optim not in _OPTIMIZERS:
        chosen.remove("optim")
    fixed = {
        name: value
        for name, value in setup.to_dict().items()
        if name not in {"model", *chosen} and value is not None and value != usual[name]
    }
    size = setup.effective_batch_size
    # Of packed rows nobody knows how many examples a step has without the data.
    known = size != DEFAULT_EFFECTIVE_BATCH_SIZE and not setup.packing
    return make_request(
        setup.model,
        gpu=card.argument,
        display=card.display,
        knobs=fixed,
        effective_batch_size=size if known else None,
    )


def asked_of(card: Card, wishes: Wishes) -> dict[str, Any]:
    """What a request says beside model and knobs."""
    return {
        "gpu": card.argument,
        "display": card.display,
        "data": None if wishes.data is None else wishes.data.path,
        "num_train_epochs": wishes.num_train_epochs,
        "price_usd_per_hour": wishes.usd_per_gpu_hour,
    }


def plan_command(sizing: Sizing) -> str:
    """`plan` with the model, the card and every knob that differs from what `plan` takes by itself."""
    command = shlex.join(["vramwise", "plan", *flags(sizing)])
    return f"{sizing.card.environment} {command}".lstrip()


def flags(sizing: Sizing) -> Sequence[str]:
    """Flags for model, card and knobs; what `plan` would choose otherwise is always told."""
    setup = sizing.setup
    words = ["--model", setup.model]
    if sizing.card.argument is not None:
        words += ["--gpu", sizing.card.argument]
    if sizing.card.display:
        words.append("--display")
    wishes = sizing.wishes
    for name, value in (
        ("data", None if wishes.data is None else wishes.data.path),
        ("epochs", wishes.num_train_epochs),
        ("price_per_hour", wishes.usd_per_gpu_hour),
    ):
        if value is not None:
            words += option(name, value)
    default = TrainingSetup(model=setup.model, max_length=setup.max_length, optim=defaults.OPTIM)
    for name, value in setup.to_dict().items():
        if name == "model" or (name in _SHARING and (value is None or sizing.card.target.count == 1)):
            continue
        if name in _SHARING or name in _CHOSEN_OTHERWISE or value != default.to_dict()[name]:
            words += option(name, value)
    return words
