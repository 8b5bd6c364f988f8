"""dataclass: the frozen classes of dataclasses.dataclass, made in a fifth of the time.

`dataclasses` writes, compiles and runs the source of seven methods for every class that it makes (0.6 ms),
and a plan imports a hundred such classes. Here `dataclasses` reads the fields and makes the slots; `__init__`
alone is compiled, once an object is made, and the others, which do the same in every class, are shared.
A type checker sees `dataclasses.dataclass` itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool, slots: bool = False, kw_only: bool = False) -> Callable[[type], type]:
        """What makes a class a frozen dataclass.

        Raises:
            TypeError: it is to be another kind of dataclass, or a field's default is made by a function:
                such classes are for `dataclasses` itself.
        """
        if not frozen:
            raise TypeError("only frozen classes are made here")
        bare = dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=kw_only, slots=slots)
        return lambda own: _complete(bare(own), kw_only=kw_only)


__all__ = ["dataclass"]


def _complete(made: type, *, kw_only: bool) -> type:
    """Give a class with fields the methods of a frozen dataclass, but those it has of its own."""
    fields = dataclasses.fields(made)
    compared = [field.name for field in fields if field.compare]
    values = _values_of(compared)
    methods: dict[str, Any] = {
        "__init__": _first_init(made, fields, kw_only=kw_only),
        "__repr__": _repr,
        "__eq__": lambda self, other: (
            values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented
        ),
        "__hash__": lambda self: hash(values(self)),
        "__setattr__": _refuse_setting,
        "__delattr__": _refuse_deleting,
    }
    if "__slots__" in made.__dict__:
        methods |= {"__getstate__": _state, "__setstate__": _set_state}
    # A class has a __hash__ of its own, null, as soon as it has an __eq__ of its own.
    own = {name for name in methods if made.__dict__.get(name) is not None}
    for name in methods.keys() - own:
        setattr(made, name, methods[name])
    # What is made frozen by `dataclasses` inherits from nothing else.
    vars(made)["__dataclass_params__"].frozen = True
    return made


def _values_of(names: list[str]) -> Callable[[Any], Any]:
    """The values of an object's fields, those of several as a tuple."""
    return attrgetter(*names) if names else lambda _: ()


def _first_init(made: type, fields: tuple[dataclasses.Field[Any], ...], *, kw_only: bool) -> Any:
    """A class's __init__ until it is called, which is when it is compiled: of the classes that are imported a
    third is never made an object of.
    """
    for field in fields:
        if field.default_factory is not dataclasses.MISSING:
            raise TypeError(f"{made.__qualname__}.{field.name} has a default that is made by a function")

    def init(self: Any, *values: Any, **named: Any) -> None:
        compiled = made.__init__ = _init(made, fields, kw_only=kw_only)  # type: ignore[misc]
        compiled(self, *values, **named)

    return init


def _init(made: type, fields: tuple[dataclasses.Field[Any], ...], *, kw_only: bool) -> Any:
    """A class's __init__, which puts each value into its slot, or into the object's dictionary."""
    known: dict[str, Any] = {}
    parameters, lines = [], []
    for number, field in enumerate(fields):
        parameters.append(field.name)
        if field.default is not dataclasses.MISSING:
            known[f"_default{number}"] = field.default
            parameters[-1] += f"=_default{number}"
        if "__slots__" in made.__dict__:
            known[f"_put{number}"] = made.__dict__[field.name].__set__
            lines.append(f"_put{number}(self, {field.name})")
        else:
            lines.append(f"self.__dict__[{field.name!r}] = {field.name}")
    if hasattr(made, "__post_init__"):
        lines.append("self.__post_init__()")
    head = ", ".join(["self", *(["*"] if kw_only and parameters else []), *parameters])
    exec(f"def __init__({head}):\n " + "\n ".join(lines or ["pass"]), known)  # noqa: S102
    made_init = known["__init__"]
    made_init.__qualname__ = f"{made.__qualname__}.__init__"
    return made_init


def _repr(self: Any) -> str:
    shown = (
        f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr
    )
    return f"{self.__class__.__qualname__}({', '.join(shown)})"


def _refuse_setting(self: Any, name: str, value: object) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_deleting(self: Any, name: str) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


def _state(self: Any) -> list[Any]:
    return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _set_state(self: Any, state: list[Any]) -> None:
    for field, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, field.name, value)
