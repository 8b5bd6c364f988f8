"""What is said of published configs: `python -m benchmarks.published_configs FOLDER [--gpu GPU]`.

FOLDER holds checkouts of trainers' repositories; every YAML file below it is read as `vramwise estimate
--config` reads it. Prints a Markdown table of file, verdict and memory or the reason for which it is refused;
`--answered` leaves the refused ones out. An error that is none of a person's ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from planner.base.errors import VramwiseError
from planner.gpus.target import GpuTarget, resolve_gpu
from planner.trainers.answer import answer

HEAD = """| config | trainer | verdict | at most, GiB | settings not used | counted otherwise |
| --- | --- | --- | --- | --- | --- |
"""


def row(path: Path, root: Path, target: GpuTarget) -> tuple[str, str]:
    """The file's line, and what kind of answer it is."""
    name = path.relative_to(root)
    try:
        found = answer(path, target)
    except VramwiseError as error:
        reason = " ".join(str(error).split()).replace("|", "/")
        return f"| {name} | | refused: {reason} | | | |\n", "refused"
    fits = "fits" if found.estimate.fits else "does not fit"
    peak = found.estimate.memory.peak_upper_bytes / 2**30
    notes = ", ".join(note.partition(":")[0] for note in found.config.notes)
    cells = (str(name), found.trainer.name, fits, f"{peak:.1f}", str(len(found.config.unused)), notes)
    return f"| {' | '.join(cells)} |\n", fits


def main(arguments: Sequence[str]) -> int:
    """Read all, print the table, and count what was said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpu", default="24GB")
    parser.add_argument("--answered", action="store_true")
    options = parser.parse_args(arguments)
    target = resolve_gpu(options.gpu)
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix in (".yml", ".yaml"))
    rows = [row(path, options.folder, target) for path in paths]
    print(HEAD, *(line for line, kind in rows if not options.answered or kind != "refused"), sep="", end="")
    counts = Counter(kind for _, kind in rows)
    print(
        f"{len(rows)} configs: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()),
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
