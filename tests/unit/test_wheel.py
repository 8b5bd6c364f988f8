"""The wheel in an environment without the sources: it plans, completes and has its man page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
COMPLETE = """
eval "$(vramwise completion bash)"
COMP_WORDS=(vramwise plan --gpu rtx-40); COMP_CWORD=3; COMPREPLY=()
$(complete -p vramwise | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${COMPREPLY[@]}"
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_an_installed_wheel_plans_and_completes(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    wheels, root = tmp_path / "wheels", tmp_path / "fresh"
    wheels.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, str(wheels)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    venv.create(root, symlinks=True)
    python = root / "bin" / Path(sys.executable).name
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    subprocess.run(
        [*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True, timeout=300
    )
    # What it needs beside is this environment's; the sources, which are installed for editing, are not.
    site = next(root.glob("lib/python*/site-packages"))
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    there = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    there |= {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "VRAMWISE_DATA_DIR": str(tmp_path / "own")}

    def told(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=there, capture_output=True, text=True, timeout=300, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert Path(told(str(python), "-c", "import planner; print(planner.__file__)").strip()).is_relative_to(
        root
    )
    assert told("vramwise", "plan", "llama-3.2-1b", "rtx-4090", "--max-length", "512").startswith("FITS")
    cards = told("bash", "-c", COMPLETE).split()
    assert {"rtx-4060", "rtx-4090"} <= set(cards)
    assert all(card.startswith("rtx-40") for card in cards)
    assert (root / "share" / "man" / "man1" / "vramwise.1").is_file()
