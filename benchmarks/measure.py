"""Measure a file of profiles on this machine's GPU, in as many processes as that takes.

    python -m benchmarks.measure PROFILES.jsonl... --output RECORDS.jsonl [--seconds N]

A child process measures one profile after the other (launcher/measuring/profiler.py); where one cannot go on
in the same process (an out-of-memory error, Liger's patches, memory that stays behind) the rest goes to a new
one.
Profiles whose record is in the output already are left out: started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measured import same_run
from launcher.measuring.profile import read_profiles
from launcher.runs.allocator import measuring_environment
from planner.calibration.records import read_records

RESERVE_SECONDS = 10.0
"""Kept back for the end of a child."""
KEPT_LOG = 4000
"""Characters of a child's log that are kept where it died."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profiles", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    for path in arguments.profiles:
        measure_file(path, arguments.output, end - time.monotonic())


def measure_file(path: Path, output: Path, seconds: float) -> None:
    """Measure what a file of profiles has and the output not yet, for so many seconds at most."""
    end = time.monotonic() + seconds
    lines = remaining(path, output)
    print(f"{path.name}: {len(lines)} to measure", flush=True)
    done = 0
    while done < len(lines) and time.monotonic() < end - 2 * RESERVE_SECONDS:
        ended, finished = _child(lines[done:], output, end - time.monotonic() - RESERVE_SECONDS)
        done += ended
        if finished:
            break


def remaining(profiles: Path, output: Path) -> list[str]:
    """Lines of the profiles that have no record in the output yet; each record stands for one profile."""
    lines = profiles.read_text(encoding="utf-8").splitlines()
    done = list(read_records(output)) if output.exists() else []
    found = []
    for line, profile in zip(lines, read_profiles(profiles), strict=True):
        record = next((record for record in done if same_run(profile, record)), None)
        if record is None:
            found.append(line)
        else:
            done.remove(record)
    return found


def _environment(profiles: Path) -> dict[str, str]:
    """The environment that suits the first profile; one that wants another ends the child."""
    return measuring_environment(os.environ, allocator=read_profiles(profiles)[0].allocator)


def _child(lines: list[str], output: Path, seconds: float) -> tuple[int, bool]:
    """Run one child; how many profiles it is through with, and whether it ended by itself."""
    with tempfile.TemporaryDirectory() as folder:
        rest, log = Path(folder) / "profiles.jsonl", Path(folder) / "log"
        rest.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "launcher.measuring.profiler", str(rest), str(output), str(seconds)]
        started = ended = 0
        with log.open("wb") as errors:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(rest)
            )
            for line in child.stdout or ():
                try:
                    said = json.loads(line)
                    event, index = said["event"], said["index"]
                except (ValueError, KeyError, TypeError):
                    continue
                if event == "started":
                    started = index + 1
                else:
                    ended = index + 1
                    print(index, said["outcome"], said["seconds"], said["message"][:200], flush=True)
            code = child.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
    if code == 0:
        return ended, True
    print("a child ended:", text[-300:].replace("\n", " | "), flush=True)
    with output.with_suffix(".failed.txt").open("a", encoding="utf-8") as failed:
        failed.write(f"{lines[max(ended, started) - 1][:300]}\n{text[-KEPT_LOG:]}\n\n")
    # A process that was not clean has not touched the profile it stopped at; any other error skips it.
    return (ended if "NotCleanError" in text else max(ended, started)), False


if __name__ == "__main__":
    main()
