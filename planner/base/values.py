"""dataclass: the frozen classes of dataclasses.dataclass, made in a tenth of the time.

`dataclasses` writes, compiles and runs the source of seven methods for every class that it makes, and looks
at every annotation (0.6 ms), and a plan imports a hundred such classes. Here `__init__` alone is compiled,
once an object is made, the others, which do the same in every class, are shared, and what is told by
`dataclasses.fields` it makes when somebody asks. A type checker sees `dataclasses.dataclass` itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
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

        def make(own: type) -> type:
            if _is_plain(own):
                made, defaults = _bare(own, slots=slots, kw_only=kw_only)
                shown = compared = tuple(made.__annotations__)
            else:
                bare = dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=kw_only, slots=slots)
                made = bare(own)
                # What is made frozen by `dataclasses` inherits from nothing else.
                vars(made)[_PARAMETERS].frozen = True
                fields = dataclasses.fields(made)
                defaults = _defaults(made, fields)
                shown = tuple(field.name for field in fields if field.repr)
                compared = tuple(field.name for field in fields if field.compare)
            return _complete(made, defaults, shown, compared, kw_only=kw_only)

        return make


__all__ = ["dataclass"]

_FIELDS, _PARAMETERS = "__dataclass_fields__", "__dataclass_params__"
_NONE = object()
"""Stands for no default."""
_TOLD_APART = ("ClassVar", "InitVar", "KW_ONLY")
"""Words of annotations that are no field's."""


class _Asked:
    """What `dataclasses` says of a class, made when it is asked for."""

    def __init__(self, defaults: dict[str, Any], *, kw_only: bool) -> None:
        self._defaults, self._kw_only = defaults, kw_only

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        made = self._owner
        names = {"__annotations__": made.__annotations__, "__module__": made.__module__, **self._defaults}
        twin: Any = type(made.__name__, (), names)
        twin.__doc__ = made.__doc__
        dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=self._kw_only)(twin)
        # What is made frozen by `dataclasses` inherits from nothing else.
        vars(twin)[_PARAMETERS].frozen = True
        for name in (_FIELDS, _PARAMETERS):
            setattr(made, name, vars(twin)[name])
        return vars(made)[self._name]


def _is_plain(own: type) -> bool:
    """Whether each annotation of a class is a field, with a plain default or none, and no base has fields."""
    names = vars(own)
    return (
        not hasattr(own, _FIELDS)
        and not any(word in str(hint) for hint in own.__annotations__.values() for word in _TOLD_APART)
        and not any(isinstance(names.get(name), dataclasses.Field) for name in own.__annotations__)
    )


def _defaults(made: type, fields: tuple[dataclasses.Field[Any], ...]) -> dict[str, Any]:
    """Every field with its default, or _NONE.

    Raises:
        TypeError: a default is made by a function.
    """
    for field in fields:
        if field.default_factory is not dataclasses.MISSING:
            raise TypeError(f"{made.__qualname__}.{field.name} has a default that is made by a function")
    return {field.name: _NONE if field.default is dataclasses.MISSING else field.default for field in fields}


def _bare(own: type, *, slots: bool, kw_only: bool) -> tuple[type, dict[str, Any]]:
    """A class with what `dataclasses` gives it but for methods: slots, and what it tells of itself; and every
    field with its default, or _NONE.

    Raises:
        TypeError: a field without a default comes after one that has it.
        ValueError: a default that can change.
    """
    fields = tuple(own.__annotations__)
    names = dict(vars(own))
    defaults = {name: names[name] for name in fields if name in names}
    for name, default in defaults.items():
        if type(default).__hash__ is None:
            raise ValueError(f"{own.__qualname__}.{name} has a default that can change: {type(default)}")
    if not kw_only and any(later in defaults and name not in defaults for later, name in pairwise(fields)):
        raise TypeError(f"{own.__qualname__}: a field without a default comes after one that has it")
    names |= {one: _Asked(defaults, kw_only=kw_only) for one in (_FIELDS, _PARAMETERS)}
    names["__match_args__"] = () if kw_only else fields
    if not slots:
        for one in (_FIELDS, _PARAMETERS, "__match_args__"):
            setattr(own, one, names[one])
        for one in (_FIELDS, _PARAMETERS):
            names[one].__set_name__(own, one)
        return own, {name: defaults.get(name, _NONE) for name in fields}
    for name in (*fields, "__dict__", "__weakref__"):
        names.pop(name, None)
    made = type(own)(own.__name__, own.__bases__, names | {"__slots__": fields})
    made.__qualname__ = own.__qualname__
    return made, {name: defaults.get(name, _NONE) for name in fields}


def _complete(
    made: type, defaults: dict[str, Any], shown: tuple[str, ...], compared: tuple[str, ...], *, kw_only: bool
) -> type:
    """Give a class with fields the methods of a frozen dataclass, but those it has of its own."""
    values = _values_of(compared)
    names = tuple(defaults)

    def shows(self: Any) -> str:
        own = (f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{self.__class__.__qualname__}({', '.join(own)})"

    def set_state(self: Any, state: list[Any]) -> None:
        for name, value in zip(names, state, strict=True):
            object.__setattr__(self, name, value)

    methods: dict[str, Any] = {
        "__init__": _first_init(made, defaults, kw_only=kw_only),
        "__repr__": shows,
        "__eq__": lambda self, other: (
            values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented
        ),
        "__hash__": lambda self: hash(values(self)),
        "__setattr__": _refuse_setting,
        "__delattr__": _refuse_deleting,
    }
    if "__slots__" in made.__dict__:
        methods["__getstate__"] = lambda self: [getattr(self, name) for name in names]
        methods["__setstate__"] = set_state
    # A class has a __hash__ of its own, null, as soon as it has an __eq__ of its own.
    own = {name for name in methods if made.__dict__.get(name) is not None}
    for name in methods.keys() - own:
        setattr(made, name, methods[name])
    return made


def _values_of(names: tuple[str, ...]) -> Callable[[Any], Any]:
    """The values of an object's fields, those of several as a tuple."""
    return attrgetter(*names) if names else lambda _: ()


def _first_init(made: type, defaults: dict[str, Any], *, kw_only: bool) -> Any:
    """A class's __init__ until it is called, which is when it is compiled: of the classes that are imported a
    third is never made an object of.
    """

    def init(self: Any, *values: Any, **named: Any) -> None:
        compiled = made.__init__ = _init(made, defaults, kw_only=kw_only)  # type: ignore[misc]
        compiled(self, *values, **named)

    return init


def _init(made: type, defaults: dict[str, Any], *, kw_only: bool) -> Any:
    """A class's __init__, which puts each value into its slot, or into the object's dictionary."""
    known: dict[str, Any] = {}
    parameters, lines = [], []
    for number, (name, default) in enumerate(defaults.items()):
        parameters.append(name)
        if default is not _NONE:
            known[f"_default{number}"] = default
            parameters[-1] += f"=_default{number}"
        if "__slots__" in made.__dict__:
            known[f"_put{number}"] = made.__dict__[name].__set__
            lines.append(f"_put{number}(self, {name})")
        else:
            lines.append(f"self.__dict__[{name!r}] = {name}")
    if hasattr(made, "__post_init__"):
        lines.append("self.__post_init__()")
    head = ", ".join(["self", *(["*"] if kw_only and parameters else []), *parameters])
    exec(f"def __init__({head}):\n " + "\n ".join(lines or ["pass"]), known)  # noqa: S102
    made_init = known["__init__"]
    made_init.__qualname__ = f"{made.__qualname__}.__init__"
    return made_init


def _refuse_setting(self: Any, name: str, value: object) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_deleting(self: Any, name: str) -> NoReturn:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
