"""Frozen dataclasses to JSON values and back: unknown keys, missing keys and wrong types are errors.

Covers what the plan's types use: str, int, float, bool, None, tuples, optionals and dataclasses. A dataclass
with a `from_dict` of its own (TrainingSetup) is read by it.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from planner.base.errors import FieldError, InputError

T = TypeVar("T")
NOT_IN_JSON: Mapping[str, bool] = MappingProxyType({"in_json": False})
"""Metadata of a field that is left out of the JSON; it has a default, which it takes when read back."""
WHERE_SET: Mapping[str, bool] = MappingProxyType({"where_set": True})
"""Metadata of a field that is left out of the JSON where it has its default."""


encode_text = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
"""A JSON value as text, in one line."""


def encode(value: Any) -> Any:
    """JSON form of a value: dataclasses become objects, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "to_dict", None) if hasattr(type(value), "from_dict") else None
        if own is not None:
            return own()
        return encode_fields(value)
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def encode_fields(value: Any) -> dict[str, Any]:
    """JSON form of a dataclass by its fields, for use inside its own `to_dict`."""
    kind = type(value)
    unset = {name for name, default in _defaults_left_out(kind) if getattr(value, name) == default}
    return {name: encode(getattr(value, name)) for name in _names(kind) if name not in unset}


def decode_fields(kind: type[T], values: object, where: str = "") -> T:
    """Read a dataclass by its fields, for use inside its own `from_dict`.

    Raises:
        InputError: an unknown or missing key, or a value of another type; the message names where.
    """
    place = where or kind.__name__
    if not isinstance(values, Mapping):
        raise FieldError(place, values, "a JSON object")
    hints = _hints(kind)
    for key in values:
        if key not in hints:
            raise FieldError(f"{place} key", key, "one of " + ", ".join(hints))
    found = {name: _decode(hints[name], values[name], f"{place}.{name}") for name in hints if name in values}
    missing = [name for name in hints if name not in found and name in _required(kind)]
    if missing:
        raise InputError(f"{place}: {', '.join(missing)} is missing")
    return kind(**found)


def _decode(hint: Any, value: object, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(typing.get_args(hint), value, where)
    if origin is tuple:
        return _decode_tuple(typing.get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        own = getattr(hint, "from_dict", None)
        return own(value) if own is not None else decode_fields(typing.cast(Any, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None):
        hint = types.NoneType
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise FieldError(where, value, getattr(hint, "__name__", str(hint)))
    return value


def _decode_union(options: tuple[Any, ...], value: object, where: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    rest = [option for option in options if option is not types.NoneType]
    for option in rest[:-1]:
        try:
            return _decode(option, value, where)
        except InputError:
            continue
    return _decode(rest[-1], value, where)


def _decode_tuple(items: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise FieldError(where, value, "a list")
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_decode(items[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(items) != len(value):
        raise FieldError(where, value, f"a list of {len(items)}")
    return tuple(
        _decode(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(items, value, strict=True))
    )


_KNOWN_HINTS: dict[type, dict[str, Any]] = {}


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind) if field.metadata.get("in_json", True))


def _defaults_left_out(kind: type) -> tuple[tuple[str, Any], ...]:
    """Fields that are left out where they have their default, and that default."""
    return tuple(
        (field.name, field.default) for field in dataclasses.fields(kind) if field.metadata.get("where_set")
    )


def _hints(kind: type) -> dict[str, Any]:
    found = _KNOWN_HINTS.get(kind)
    if found is None:
        hints = typing.get_type_hints(kind)
        found = _KNOWN_HINTS[kind] = {name: hints[name] for name in _names(kind)}
    return found


def _required(kind: type) -> frozenset[str]:
    return frozenset(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
