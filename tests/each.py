"""One test for many things of a kind, that tells of all which fail and names each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def for_each(
    things: Iterable[Any] | Callable[[], Iterable[Any]], *, name: Callable[[Any], object] = str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test's assertions on every thing, which it takes as its first argument.

    Unlike `parametrize`, things may come from a function, which is called when the test runs, and a reader
    of results sees one line. Other arguments are fixtures, made once. No thing at all is a failure too.
    """

    def decorated(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def test(**fixtures: Any) -> None:
            found = list(things() if callable(things) else things)
            assert found, "there is nothing to check"
            wrong = []
            for thing in found:
                try:
                    check(thing, **fixtures)
                except (AssertionError, pytest.fail.Exception) as error:
                    wrong.append(f"{name(thing)}: {error}")
                except BaseException as error:
                    error.add_note(f"with {name(thing)}")
                    raise
            if wrong:
                pytest.fail(f"{len(wrong)} of {len(found)} are wrong:\n" + "\n".join(wrong), pytrace=False)

        signature = inspect.signature(check)
        _, *others = signature.parameters.values()
        test.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return test

    return decorated
