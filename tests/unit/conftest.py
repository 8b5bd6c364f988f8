"""The command line in this process: its exit code, what it printed, and what it said on stderr."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher import cli as launcher_cli
from planner.commands.program import guarded


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


Cli = Callable[..., Finished]


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Finished]:
    """Run `vramwise ARGUMENTS...` as at a prompt of 80 columns, with a data folder of its own."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("VRAMWISE_DATA_DIR", str(tmp_path / "user-data"))
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        code = guarded("vramwise", lambda: launcher_cli.run([str(a) for a in arguments]))
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return run
