"""PlanRequest: what a person asked for; the rest is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from planner.base import validate
from planner.base.errors import FieldError, InputError
from planner.base.values import dataclass
from planner.gpus.parse import parse_gpu
from planner.setup.defaults import FASTER_OPTIM
from planner.setup.knob import Knob, KnobValue
from planner.setup.knobs import BF16, KNOBS
from planner.setup.objective import SFT
from planner.setup.parallelism import FSDP
from planner.setup.training_knobs import DEFAULT_RANK
from planner.setup.training_setup import TrainingSetup

__all__ = [
    "DEFAULT_EFFECTIVE_BATCH_SIZE",
    "DEFAULT_RANK",
    "KNOB_NAMES",
    "KnobValue",
    "PlanRequest",
    "make_request",
    "planned",
]

DEFAULT_EFFECTIVE_BATCH_SIZE = 16
KNOB_NAMES = tuple(knob.name for knob in KNOBS)
# Stands in for the length while knobs are checked before a length is chosen.
_ANY_LENGTH = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What `plan` is asked, validated.

    `gpu` is the text of `--gpu` (null: this machine's), `data` a file of training examples. `knobs` are the
    TrainingSetup keys that are fixed, in (name, value) pairs; everything else is chosen. `display` says that
    a display is attached to the card, `allow_8bit` that products with the frozen base may be chosen to be in
    8 bits. Null stands for "not asked".

    Raises:
        FieldError: a value is outside what is accepted, or a knob is unknown.
        InputError: two knobs contradict each other.
    """

    model: str
    gpu: str | None = None
    data: str | None = None
    knobs: tuple[tuple[str, KnobValue], ...] = ()
    effective_batch_size: int | None = None
    num_train_epochs: float | None = None
    learning_rate: float | None = None
    price_usd_per_hour: float | None = None
    display: bool = False
    allow_8bit: bool = False

    def __post_init__(self) -> None:
        validate.text("--model", self.model)
        if self.gpu is not None and not isinstance(self.gpu, str):
            raise FieldError("--gpu", self.gpu, "a GPU's name or a size such as 16GB")
        if self.data is not None:
            validate.text("--data", self.data)
            if self.fixed.get("task", SFT.name) != SFT.name:
                raise InputError(
                    f"--data is read for task {SFT.name} alone: leave it out and give --max-length for task "
                    f"{self.fixed['task']}"
                )
        for name, _ in self.knobs:
            if name not in KNOB_NAMES:
                raise FieldError("knob", name, "one of " + ", ".join(KNOB_NAMES))
        if self.effective_batch_size is not None:
            validate.integer("effective_batch_size", self.effective_batch_size, minimum=1, maximum=2**20)
        if self.num_train_epochs is not None:
            _positive("epochs", self.num_train_epochs, 1e6)
        if self.learning_rate is not None:
            _positive("learning_rate", self.learning_rate, 10.0)
        if self.price_usd_per_hour is not None:
            validate.number("price_per_hour", self.price_usd_per_hour, minimum=0.0, maximum=1e6)
        validate.boolean("display", self.display)
        validate.boolean("allow_8bit", self.allow_8bit)
        self.setup(max_length=_ANY_LENGTH, num_processes=self._cards())

    def _cards(self) -> int:
        """How many GPUs share the work where a way to share it is asked for: as many as `gpu` says."""
        if "distributed" not in self.fixed or self.gpu is None:
            return 1
        try:
            return parse_gpu(self.gpu).count
        except InputError:  # said in its own words where the GPU is looked up
            return 1

    @property
    def fixed(self) -> dict[str, KnobValue]:
        """The fixed knobs by name."""
        return dict(self.knobs)

    def without(self, *names: str) -> PlanRequest:
        """The same request with knobs left open."""
        return dataclasses.replace(self, knobs=tuple(pair for pair in self.knobs if pair[0] not in names))

    def with_knobs(self, knobs: Mapping[str, KnobValue]) -> PlanRequest:
        """The same request with knobs fixed, in place of what it has fixed them at.

        Raises:
            FieldError: a value is outside what is accepted, or a knob is unknown.
            InputError: two knobs contradict each other.
        """
        return dataclasses.replace(self, knobs=tuple({**self.fixed, **knobs}.items()))

    def with_effective_batch(self, size: int | None) -> PlanRequest:
        """The same request with an effective batch; null leaves it as it is."""
        return self if size is None else dataclasses.replace(self, effective_batch_size=size)

    def setup(self, **chosen: Any) -> TrainingSetup:
        """Build the setup of the fixed knobs and of what was chosen; a fixed knob wins.

        Raises:
            InputError: the values contradict each other.
        """
        values = {**chosen, **self.fixed}
        if values.get("base_matmul", BF16) != BF16:
            values = {"compile": "regional", **values}
        if values.get("distributed") == FSDP:
            # What is taken elsewhere cannot update shares.
            values = {"optim": FASTER_OPTIM, **values}
        return TrainingSetup(model=self.model, **planned(values))


def make_request(model: str, *, knobs: Mapping[str, Any] | None = None, **wishes: Any) -> PlanRequest:
    """Build a request from a mapping of knobs; lists become tuples.

    Raises:
        InputError: see PlanRequest.
    """
    pairs = tuple(
        (name, tuple(value) if isinstance(value, list) else value) for name, value in (knobs or {}).items()
    )
    return PlanRequest(model=model, knobs=pairs, **wishes)


def planned(values: Mapping[str, Any], knobs: tuple[Knob, ...] = KNOBS) -> dict[str, Any]:
    """Values by knob with what a plan takes where they say nothing, of knobs whose needs they meet."""
    full = {knob.name: knob.default for knob in knobs} | dict(values)
    taken = {
        knob.name: knob.planned
        for knob in knobs
        if knob.planned is not None and all(full[need.other] != need.other_than for need in knob.needs)
    }
    return {**taken, **values}


def _positive(field: str, value: object, maximum: float) -> None:
    if validate.number(field, value, minimum=0.0, maximum=maximum) == 0.0:
        raise FieldError(field, value, f"a number above 0, at most {maximum:g}")
