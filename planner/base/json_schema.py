"""JSON Schema (draft 2020-12) of frozen dataclasses: of what the JSON codec writes and reads."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}
Properties = Callable[[type], Mapping[str, Mapping[str, Any]]]
"""What is said of a class's fields beyond their types, by field."""


def schema_of(
    kind: Any, *, name: str, version: int, more: Properties = lambda kind: {}, closed: bool = False
) -> dict[str, Any]:
    """The schema of a type, its dataclasses under `$defs`.

    Within a version keys are added and none is changed or taken away, so that objects may hold others than
    are listed; where it is `closed` they may not.

    Raises:
        TypeError: a type that has no JSON form here.
    """
    made = _Schema(more, closed)
    found = made.of(kind)
    # One document, not a reference to a part of itself.
    if set(found) == {"$ref"}:
        found = made.definitions.pop(kind.__name__)
    head = {"$schema": DRAFT, "$id": f"urn:vramwise:{name}:{version}"}
    return {**head, **found, "$defs": dict(sorted(made.definitions.items()))}


class _Schema:
    def __init__(self, more: Properties, closed: bool) -> None:
        self._more = more
        self._closed = closed
        self.definitions: dict[str, dict[str, Any]] = {}

    def of(self, hint: Any) -> dict[str, Any]:
        """The schema of a type hint."""
        if hint in _PLAIN:
            return dict(_PLAIN[hint])
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            return {"anyOf": [self.of(part) for part in parts]}
        if origin is typing.Literal:
            return {"enum": list(parts)}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.of(parts[1])}
        if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
            return {"type": "array", "items": self.of(parts[0])}
        if origin is tuple:
            items = [self.of(part) for part in parts]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if hint.__name__ not in self.definitions:
                self.definitions[hint.__name__] = {}  # known before its fields, which may name it
                self.definitions[hint.__name__] = self._object(hint)
            return {"$ref": f"#/$defs/{hint.__name__}"}
        raise TypeError(f"no JSON form of {hint} is known")

    def _object(self, kind: type) -> dict[str, Any]:
        hints, more = typing.get_type_hints(kind), self._more(kind)
        fields = [field for field in dataclasses.fields(kind) if field.metadata.get("in_json", True)]
        made: dict[str, Any] = {
            "type": "object",
            "description": " ".join((inspect.getdoc(kind) or "").partition("\n\nRaises:")[0].split()),
            "properties": {
                field.name: {**self.of(hints[field.name]), **more.get(field.name, {})} for field in fields
            },
            # What is left out where it has its default.
            "required": [field.name for field in fields if not field.metadata.get("where_set")],
        }
        return {**made, "additionalProperties": False} if self._closed else made
