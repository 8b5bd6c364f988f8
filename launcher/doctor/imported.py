"""What torch and bitsandbytes say of themselves, asked in a process of its own (`python -m` this module).

Importing them takes seconds and may end the process that does it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from planner.base.json_codec import decode_fields, encode
from planner.base.values import dataclass

SECONDS = 180
"""After which an import counts as failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What was imported. `torch_cuda` is the CUDA that torch was built for (null: none), `architectures`
    those that it has kernels for ("sm_90", "compute_90"), `sees_cuda` whether it sees a GPU. `bitsandbytes`
    says whether its own library was loaded, null where it is not installed; `failure` is what an import
    failed with.
    """

    torch: str | None = None
    torch_cuda: str | None = None
    architectures: tuple[str, ...] = ()
    sees_cuda: bool = False
    bitsandbytes: bool | None = None
    failure: str | None = None


def ask() -> Imported:
    """Import both in a child process and take what it prints."""
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, a module of ours
            [sys.executable, "-m", __name__],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Imported(failure=f"importing torch took more than {SECONDS} s")
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Imported(failure=last[:300])
    return decode_fields(Imported, json.loads(lines[-1]))


def look() -> Imported:
    """The same in this process."""
    import torch

    return Imported(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()),
        sees_cuda=torch.cuda.is_available(),
        bitsandbytes=_bitsandbytes(),
    )


def _bitsandbytes() -> bool | None:
    try:
        import bitsandbytes
        from bitsandbytes import cextension
    except ModuleNotFoundError:
        return None
    # Where its library cannot be loaded, it puts a stand-in there that raises when it is used.
    native: Any = cextension.BNBNativeLibrary
    return bool(bitsandbytes.__version__) and isinstance(cextension.lib, native)


if __name__ == "__main__":
    print(json.dumps(encode(look())))
