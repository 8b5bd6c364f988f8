"""Small checks used by the frozen types at construction; each raises FieldError naming field and value."""

from __future__ import annotations

import math
from collections.abc import Collection

from planner.base.errors import FieldError


def integer(field: str, value: object, *, minimum: int, maximum: int) -> int:
    """Accept an int (not a bool) within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise FieldError(field, value, f"a whole number from {minimum:,} to {maximum:,}")
    return value


def number(field: str, value: object, *, minimum: float, maximum: float) -> float:
    """Accept a finite int or float (not a bool) within the bounds."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not minimum <= value <= maximum
    ):
        raise FieldError(field, value, f"a number from {minimum:g} to {maximum:g}")
    return float(value)


def boolean(field: str, value: object) -> bool:
    """Accept true or false only; 0, 1 and "yes" are refused."""
    if not isinstance(value, bool):
        raise FieldError(field, value, "true or false")
    return value


def choice(field: str, value: object, accepted: Collection[str]) -> str:
    """Accept one of a set of strings."""
    if not isinstance(value, str) or value not in accepted:
        raise FieldError(field, value, "one of " + ", ".join(accepted))
    return value


def text(field: str, value: object, *, maximum_length: int = 4096) -> str:
    """Accept a non-empty string without control characters."""
    if (
        not isinstance(value, str)
        or not value.strip()
        or len(value) > maximum_length
        or not value.isprintable()
    ):
        raise FieldError(field, value, f"a printable text of 1 to {maximum_length:,} characters")
    return value
