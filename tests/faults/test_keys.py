"""The command line under keys and signals, in a terminal of its own; trainer and sampler are stand-ins."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.ends import RunExit
from launcher.runs.folder import RunFolder
from launcher.runs.locks import live_pid
from launcher.runs.supervisor import status
from tests.faults import stand_ins

PROCESSES = ("trainer", "keeper", "sampler")
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


class Terminal:
    """A process in a pseudo-terminal, what it printed, and keys for it."""

    def __init__(self, *command: str) -> None:
        self.keys, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            cwd=stand_ins.ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        )
        os.close(theirs)
        self.shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                new = os.read(self.keys, 65536)
            except OSError:
                return
            if not new:
                return
            self.shown += new

    def press_ctrl_c(self) -> None:
        os.write(self.keys, b"\x03")

    def close(self) -> None:
        """Close the terminal, as when the window is closed or the connection breaks."""
        os.close(self.keys)

    def code(self) -> int:
        code = self.process.wait(120)
        self._reader.join(5)
        return code

    @property
    def text(self) -> str:
        return self.shown.decode("utf-8", "replace")


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.05)


def train(root: Path, **order: Any) -> tuple[Terminal, RunFolder]:
    """`vramwise train` from the moment on in which it has planned."""
    stand_ins.order_next(root, **order)
    return Terminal(sys.executable, "-m", "tests.faults.stand_ins", "train", str(root)), RunFolder(
        root / "run"
    )


def command(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "launcher.cli", *arguments)


def wait_for_steps(folder: RunFolder, steps: int = 3) -> None:
    wait_until(lambda: folder.events.is_file() and status(folder.path).step >= steps)


def nobody_left(folder: RunFolder) -> bool:
    return all(live_pid(folder, process) is None for process in PROCESSES)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Where the run `run` is made; nothing of it is left when the test is over."""
    yield tmp_path
    for process in PROCESSES:
        if (pid := live_pid(RunFolder(tmp_path / "run"), process)) is not None:
            os.kill(pid, signal.SIGKILL)


def test_ctrl_c_stops_after_the_step_and_saves(root: Path) -> None:
    terminal, folder = train(root)
    wait_for_steps(folder)
    terminal.press_ctrl_c()
    assert terminal.code() == RunExit.STOPPED_SAVED
    assert status(folder.path).state == "stopped"
    assert "stopping after this step and saving; Ctrl-C again ends the run at once" in terminal.text
    assert "Stopped after" in terminal.text
    assert str(folder.adapter) in terminal.text.replace("\r\n", "")
    assert "Traceback" not in terminal.text
    assert terminal.shown.rfind(SHOW) > terminal.shown.rfind(HIDE) >= 0
    wait_until(lambda: nobody_left(folder))


@pytest.mark.parametrize("saves", [0, 2])
def test_a_second_ctrl_c_ends_it_at_once_and_says_what_is_kept(root: Path, saves: int) -> None:
    terminal, folder = train(root, step_seconds=0.2, late_step=6, late_seconds=600, saves=saves)
    wait_for_steps(folder, 5)
    terminal.press_ctrl_c()
    wait_until(lambda: "Ctrl-C again" in terminal.text)
    terminal.press_ctrl_c()
    assert terminal.code() == RunExit.STOPPED_UNSAVED
    kept = "the checkpoint of step 4" if saves else "nothing, since no checkpoint was written"
    assert f"ending the run now; kept: {kept}" in terminal.text
    assert "Interrupted after 5 steps" in terminal.text
    assert not folder.adapter.exists()
    assert nobody_left(folder) or wait_until(lambda: nobody_left(folder)) is None


def test_a_third_ctrl_c_kills_what_does_not_react(root: Path) -> None:
    terminal, folder = train(root, deaf=True)
    wait_for_steps(folder)
    pid = live_pid(folder, "trainer")
    for said in ("Ctrl-C again", "ending the run now", "killing the trainer"):
        terminal.press_ctrl_c()
        wait_until(lambda said=said: said in terminal.text)  # type: ignore[misc]
    assert terminal.code() == RunExit.STOPPED_UNSAVED
    assert pid is not None
    assert nobody_left(folder)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_ctrl_c_while_the_run_is_started_leaves_nobody(root: Path) -> None:
    """Between the start of the keeper and the first look, and while the trainer loads."""
    terminal, folder = train(root, loads_for=600)
    wait_until(lambda: folder.log("keeper").exists())
    terminal.press_ctrl_c()
    wait_until(lambda: "Ctrl-C again" in terminal.text)
    terminal.press_ctrl_c()
    assert terminal.code() == RunExit.STOPPED_UNSAVED
    assert nobody_left(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_to_the_command_line_is_passed_on(root: Path, number: signal.Signals) -> None:
    terminal, folder = train(root)
    wait_for_steps(folder)
    terminal.process.send_signal(number)
    assert terminal.code() == RunExit.STOPPED_SAVED
    assert f"{number.name}: stopping after this step and saving" in terminal.text
    assert folder.adapter.is_dir()
    assert terminal.shown.rfind(SHOW) > terminal.shown.rfind(HIDE) >= 0


def test_a_run_that_is_stopped_from_outside_is_no_success_and_says_why(root: Path) -> None:
    terminal, folder = train(root)
    wait_for_steps(folder)
    stop = subprocess.run(
        command("runs", "stop", "run", "--runs", str(root)), cwd=stand_ins.ROOT, capture_output=True
    )
    assert stop.returncode == 0, stop.stderr
    assert terminal.code() == RunExit.STOPPED_SAVED
    assert "the run ended: stopped: stopped on request after step" in terminal.text


@pytest.mark.parametrize(
    ("order", "code", "words"),
    [
        ({"steps": 4}, RunExit.FINISHED, "Finished after 4 steps"),
        ({"dies_at": 3, "by": int(signal.SIGKILL)}, RunExit.KILLED, "ended by SIGKILL after step 2"),
    ],
)
def test_the_exit_code_is_that_of_the_end(
    root: Path, order: dict[str, Any], code: RunExit, words: str
) -> None:
    terminal, _ = train(root, **order)
    assert terminal.code() == code
    assert words in terminal.text
    follow = subprocess.run(
        command("runs", "follow", "run", "--runs", str(root)), cwd=stand_ins.ROOT, capture_output=True
    )
    assert follow.returncode == code


def test_a_closed_terminal_leaves_the_run_alone(root: Path) -> None:
    terminal, folder = train(root)
    wait_for_steps(folder)
    terminal.close()
    assert terminal.process.wait(120) == 128 + signal.SIGHUP
    step = status(folder.path).step
    wait_until(lambda: status(folder.path).step > step + 5)


def test_sighup_to_the_command_line_shows_the_cursor(root: Path) -> None:
    terminal, folder = train(root)
    wait_for_steps(folder)
    wait_until(lambda: HIDE in terminal.shown)
    terminal.process.send_signal(signal.SIGHUP)
    assert terminal.code() == 128 + signal.SIGHUP
    assert terminal.shown.rfind(SHOW) > terminal.shown.rfind(HIDE) >= 0
    assert status(folder.path).alive


@pytest.mark.parametrize("how", ["key", "SIGTERM"])
def test_leaving_the_view_of_a_run_leaves_the_run_alone(root: Path, how: str) -> None:
    _, folder = train(root)
    wait_for_steps(folder)
    view = Terminal(*command("runs", "follow", "run", "--runs", str(root)))
    wait_until(lambda: b"loss" in view.shown)
    if how == "key":
        view.press_ctrl_c()
    else:
        view.process.send_signal(signal.SIGTERM)
    assert view.code() == 128 + (signal.SIGINT if how == "key" else signal.SIGTERM)
    assert f"the run goes on; vramwise runs stop run --runs {root} ends it" in view.text
    assert view.shown.rfind(SHOW) > view.shown.rfind(HIDE) >= 0
    step = status(folder.path).step
    wait_until(lambda: status(folder.path).step > step + 5)
    assert not folder.stop.exists()


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True).returncode,
    reason="needs the right to make a PID namespace",
)
def test_as_process_1_of_a_container_sigterm_saves(root: Path) -> None:
    """As `docker stop` sends it; the kernel drops what process 1 has no handler for."""
    stand_ins.order_next(root)
    inside = (sys.executable, "-m", "tests.faults.stand_ins", "train", str(root))
    terminal = Terminal("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *inside)
    folder = RunFolder(root / "run")
    wait_for_steps(folder)
    # Seen from outside: the state by the kernel's lock, though the pids in the files are others.
    assert status(folder.path).state == "running"
    (children,) = Path(f"/proc/{terminal.process.pid}/task").glob("*/children")
    begun = time.monotonic()
    os.kill(int(children.read_text().split()[0]), signal.SIGTERM)
    assert terminal.code() == RunExit.STOPPED_SAVED
    assert time.monotonic() - begun < 60
    assert status(folder.path).state == "stopped"
    assert folder.adapter.is_dir()
