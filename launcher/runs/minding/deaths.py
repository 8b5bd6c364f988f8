"""Why a trainer died that could not say it: the signal, and whether the kernel took it for want of memory.

Light: no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class KillCounters:
    """How many processes the kernel has killed for want of memory, by counter: the control group's own where
    there is one (https://docs.kernel.org/admin-guide/cgroup-v2.html: memory.events, oom_kill), else the
    machine's (/proc/vmstat, oom_kill).
    """

    in_group: int | None
    on_machine: int | None

    def grown_since(self, before: KillCounters) -> str | None:
        """Whose memory ran out since: "the control group's", "the machine's", or nobody's."""
        if self.in_group is not None and before.in_group is not None:
            return "the control group's" if self.in_group > before.in_group else None
        if self.on_machine is not None and before.on_machine is not None:
            return "the machine's" if self.on_machine > before.on_machine else None
        return None


def read_kill_counters(
    *,
    group: Path = Path("/proc/self/cgroup"),
    groups: Path = Path("/sys/fs/cgroup"),
    machine: Path = Path("/proc/vmstat"),
) -> KillCounters:
    """Read both counters; null where the kernel has none."""
    return KillCounters(
        in_group=_named(_events_file(group, groups), "oom_kill"), on_machine=_named(machine, "oom_kill")
    )


def _events_file(group: Path, groups: Path) -> Path | None:
    """Where this process's control group counts: memory.events of version 2 (the line "0::/path"), else
    memory.oom_control of version 1 ("4:memory:/path"); seen from within a container the group is the root of
    what is mounted.
    """
    found: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        for line in group.read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if (number, controllers) == ("0", ""):
                found[:0] = [groups / path.lstrip("/") / "memory.events", groups / "memory.events"]
            elif "memory" in controllers.split(","):
                root = groups / "memory"
                found += [root / path.lstrip("/") / "memory.oom_control", root / "memory.oom_control"]
    return next((path for path in found if path.is_file()), None)


def _named(path: Path | None, name: str) -> int | None:
    if path is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="ascii").splitlines():
            words = line.split()
            if len(words) == 2 and words[0] == name:
                return int(words[1])
    return None


def signal_name(number: int) -> str:
    """SIGKILL for 9; "signal 64" where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def advice_on_memory(whose: str) -> str:
    """What to do where the kernel ended the trainer because memory of the host ran out."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    limit = (
        "raise its limit" if whose != "the machine's" else f"this machine has {pages * size / _GIB:.1f} GiB"
    )
    return (
        f"{whose} memory ran out and the kernel ended the trainer (SIGKILL); {limit}, close other programs, "
        "or train a smaller model: this is memory of the host and not of the GPU"
    )
