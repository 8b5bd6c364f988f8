"""Models described as by a child process, whose imports of torch and transformers take 5 s, in this one.

What the child reads, prints and exits with is its own. That one is started, ended and bounded in memory is
tested where it is (tests/stack/test_inspect_model.py, tests/unit/test_inspectors.py).
"""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from launcher.models import inspect


def _run(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:  # noqa: A002
    assert command == [sys.executable, "-m", inspect.__name__]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "stdin", io.StringIO(input)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _logged_to(err),
    ):
        try:
            code = int(inspect.main())
        except Exception:  # noqa: BLE001 - as the interpreter ends on what nobody catches
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _logged_to(stream: io.StringIO) -> Iterator[None]:
    """What transformers logs, whose handler has held on to stderr since it was imported."""
    with contextlib.ExitStack() as stack:
        for handler in logging.getLogger("transformers").handlers:
            if isinstance(handler, logging.StreamHandler):
                stack.enter_context(mock.patch.object(handler, "stream", stream))
        yield


@contextlib.contextmanager
def here() -> Iterator[None]:
    """Have `inspect_in_child` run its child's `main` in this process, which gets no limits."""
    started = SimpleNamespace(run=_run, TimeoutExpired=subprocess.TimeoutExpired)
    with (
        mock.patch.object(inspect, "subprocess", started),
        mock.patch.object(inspect, "_limit_memory"),
    ):
        yield
