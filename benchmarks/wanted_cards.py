"""The table of docs/records.md: `python -m benchmarks.wanted_cards`, the cards whose records are wanted most.

First those that plain sizes stand for ("16GB"), since a plan for a size rests on them; then, by compute
capability, all others that no record is of.
"""

from __future__ import annotations

from collections import defaultdict

from planner.base.data_files import PROFILES
from planner.calibration.records import read_records
from planner.gpus.catalog import gpu_catalog
from planner.gpus.parse import REFERENCE_CARDS

_HEAD = "| card | why |\n| --- | --- |\n"


def measured() -> dict[str, int]:
    """How many shipped records a card has, by its id."""
    counts: dict[str, int] = defaultdict(int)
    for path in sorted((PROFILES / "runs").glob("**/*.jsonl")):
        for record in read_records(path):
            counts[record.environment.gpu_id] += 1
    return dict(counts)


def table() -> str:
    """A row for each card that a size stands for, then one for each compute capability."""
    known, cards = measured(), {gpu.id: gpu for gpu in gpu_catalog()}
    rows = [
        f"| `{name}` | stands for {size}GB; {_capability(cards[name].compute_capability, known)} |\n"
        for size, name in REFERENCE_CARDS.items()
        if name not in known
    ]
    others: dict[tuple[int, int], list[str]] = defaultdict(list)
    for gpu in cards.values():
        if gpu.id not in known and gpu.id not in REFERENCE_CARDS.values():
            others[gpu.compute_capability].append(f"`{gpu.id}`")
    rows += [f"| {', '.join(sorted(others[one]))} | {_capability(one, known)} |\n" for one in sorted(others)]
    return _HEAD + "".join(rows)


def _capability(capability: tuple[int, int], known: dict[str, int]) -> str:
    """Whether any card of a compute capability has a record."""
    shown = ".".join(map(str, capability))
    same = [gpu.id for gpu in gpu_catalog() if gpu.compute_capability == capability and gpu.id in known]
    return f"compute capability {shown}: {'records of ' + ', '.join(same) if same else 'no record so far'}"


if __name__ == "__main__":
    print(table())
