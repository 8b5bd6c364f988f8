"""planner.base.values: its classes do what those of `dataclasses` do."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import field
from typing import Any, get_type_hints

import pytest

from planner.base import values


def made(decorator: Any, *, plain: bool, **options: bool) -> type:
    """The same class by either way of making one; a `plain` one has no field with words on it."""

    @decorator(frozen=True, kw_only=True, **options)
    class Point:
        """A point."""

        x: int
        y: int = 2
        label: str = "" if plain else field(default="", compare=False, repr=False, metadata={"shown": False})

        def __post_init__(self) -> None:
            if self.x < 0:
                raise ValueError("negative")

    return Point


def outcome(act: Callable[[type], object], kind: type) -> object:
    """What an act gives, or the error that it raises."""
    try:
        return act(kind)
    except (TypeError, ValueError, AttributeError) as error:
        return type(error), str(error)


def _set(kind: type) -> None:
    kind(x=1).x = 2


def _delete(kind: type) -> None:
    del kind(x=1).x


ACTS: tuple[Callable[[Any], object], ...] = (
    lambda kind: repr(kind(x=1, label="a")),
    lambda kind: kind(x=1, label="a") == kind(x=1, label="b"),
    lambda kind: kind(x=1) == kind(x=2),
    lambda kind: kind(x=1) == (1, 2),
    lambda kind: hash(kind(x=1, label="a")) == hash(kind(x=1)),
    lambda kind: kind(),
    lambda kind: kind(1),
    lambda kind: kind(x=1, z=1),
    lambda kind: kind(x=-1),
    lambda kind: dataclasses.astuple(dataclasses.replace(kind(x=1), y=5)),
    lambda kind: dataclasses.replace(kind(x=1), x=-5),
    lambda kind: dataclasses.asdict(kind(x=1)),
    lambda kind: dataclasses.astuple(copy.deepcopy(kind(x=1, y=7))),
    lambda kind: [(one.name, dict(one.metadata)) for one in dataclasses.fields(kind)],
    lambda kind: list(inspect.signature(kind).parameters),
    lambda kind: kind.__doc__,
    lambda kind: (dataclasses.is_dataclass(kind), kind.__match_args__),
    lambda kind: get_type_hints(kind),
    lambda kind: [(one.name, one.default, one.type, one.kw_only) for one in dataclasses.fields(kind)],
    lambda kind: dataclasses.astuple(made_on(kind)(x=1, z=3)),
    _set,
    _delete,
)


def made_on(kind: type) -> Any:
    """A class of `dataclasses` with more fields than one of ours."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Further(kind):  # type: ignore[misc,valid-type]
        z: int

    return Further


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("slots", [True, False])
def test_a_class_does_what_one_of_dataclasses_does(slots: bool, plain: bool) -> None:
    makers = (values.dataclass, dataclasses.dataclass)
    ours, theirs = (made(maker, plain=plain, slots=slots) for maker in makers)
    for act in ACTS:
        assert outcome(act, ours) == outcome(act, theirs)
    assert hasattr(ours(x=1), "__dict__") != slots


def test_a_plan_in_another_process_is_the_same() -> None:
    from planner.setup.training_setup import TrainingSetup

    setup = TrainingSetup(model="llama-3.1-8b", max_length=2048)
    assert pickle.loads(pickle.dumps(setup)) == setup


def test_what_is_not_frozen_or_needs_a_function_is_for_dataclasses() -> None:
    with pytest.raises(TypeError, match="frozen"):
        values.dataclass(frozen=False)

    class Listing:
        names: list[str] = field(default_factory=list)

    with pytest.raises(TypeError, match=r"Listing\.names"):
        values.dataclass(frozen=True)(Listing)
