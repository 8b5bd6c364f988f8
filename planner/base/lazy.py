"""What is looked up when it is first asked for: a package's names, an object's facts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

__all__ = ["cached_fact", "lazy_names"]

if TYPE_CHECKING:
    from functools import cached_property as cached_fact
else:

    class cached_fact:  # noqa: N801 - a decorator, as functools.cached_property is one
        """functools.cached_property without its lock, which takes Python 3.11 as long as a small fact: two
        threads that ask at once work it out twice.
        """

        def __init__(self, work_out: Callable[[Any], Any]) -> None:
            self._work_out = work_out
            self.__doc__ = work_out.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            found = instance.__dict__[self._name] = self._work_out(instance)
            return found


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` for names that live in the modules `homes` gives."""

    def find(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home), name)

    return find, lambda: sorted(homes)
