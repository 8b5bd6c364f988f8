"""Start a run's processes: each in a session of its own, output to a file, so that nobody need stay alive.

Light: no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from launcher.runs.folder import RunFolder

_PROJECT_ROOT = Path(__file__).resolve().parents[3]


def spawn(
    folder: RunFolder,
    process: str,
    module: str,
    variables: Mapping[str, str] | None = None,
    *,
    arguments: Iterable[str] = (),
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `python -m module RUN_DIR ARGUMENTS`; it inherits `descriptors` and this process's environment
    with `variables`.

    Raises:
        OSError: its log cannot be written, or there is no process to be had.
    """
    # -P and the project's own root: a file beside the user's data must not shadow a library.
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(_PROJECT_ROOT), *([inherited] if inherited else [])])
    with folder.log(process).open("ab") as log:
        return subprocess.Popen(  # noqa: S603 (our own interpreter and module, no shell)
            [sys.executable, "-P", "-m", module, str(folder.shown), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=descriptors,
            env={**os.environ, **(variables or {}), "PYTHONPATH": path},
        )
