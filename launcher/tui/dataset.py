"""A data file as the sizing screen knows it: made for a worker thread, since a large one takes seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from planner.base.errors import InputError
from planner.data.files import is_data_file, on_this_machine
from planner.data.lengths import DatasetStats
from planner.data.reader import mistakes
from planner.planning.make_plan import read_stats
from planner.throughput.epoch import Examples

MOST_MISTAKES = 8
"""Mistakes of a data file that are shown, each a line or two of a dialog."""
MOST_PATHS = 200


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Dataset:
    """Data that was read: its path, or its name on the Hub, and what batches of it come to.

    `count`, `tokens`, `half` and `nearly_all` are its examples, their tokens, and the lengths that half and
    99% of them do not exceed: what every answer shows, counted once.
    """

    path: str
    stats: DatasetStats = field(repr=False)
    examples: Examples = field(repr=False)
    count: int
    tokens: int
    half: int
    nearly_all: int

    @property
    def name(self) -> str:
        """The last part of the path; a data set of the Hub by its whole name."""
        return Path(self.path).name if Path(self.path).exists() else self.path


class UnreadableDataError(InputError):
    """Data that cannot be read; `mistakes` are the first of them, each with its place."""

    def __init__(self, found: tuple[str, ...]) -> None:
        self.mistakes = found
        super().__init__(found[0])


def read_dataset(text: str, *, allow_network: bool = False) -> Dataset:
    """Read the lengths of data as `plan` does.

    Raises:
        UnreadableDataError: it is no training data.
        InputError: it is not on this machine and may not be fetched.
        MissingExtraError: the package that reads it is not there.
    """
    named = str(Path(text).expanduser()) if text.startswith("~") else text
    path = on_this_machine(named, allow_network=allow_network)
    try:
        stats = read_stats(path)
    except InputError as error:
        # One mistake is told by whoever needs the whole file; a person mends several at a time.
        raise UnreadableDataError(mistakes(Path(path), most=MOST_MISTAKES) or (str(error),)) from error
    if stats.images:
        raise UnreadableDataError(
            (f"{path}: has images, which the command line plans and trains (vramwise train, docs/vision.md)",)
        )
    if Path(path).exists():
        path = str(Path(path).resolve())
    return Dataset(
        path=path,
        stats=stats,
        examples=Examples(stats),
        count=stats.examples,
        tokens=stats.total_tokens,
        half=stats.percentile(50),
        nearly_all=stats.percentile(99),
    )


def completions(text: str) -> tuple[str, ...]:
    """Paths that go on from what was typed: folders, with a slash, and files of data, by name."""
    typed = Path(text).expanduser()
    folder, start = (typed, "") if text.endswith("/") or not text else (typed.parent, typed.name)
    try:
        found = sorted(folder.iterdir(), key=lambda path: path.name.lower())
    except OSError:
        return ()
    shown = [path for path in found if _goes_on(path, start)]
    before = text[: len(text) - len(start)]
    return tuple(f"{before}{path.name}{'/' if path.is_dir() else ''}" for path in shown[:MOST_PATHS])


def _goes_on(path: Path, start: str) -> bool:
    if not path.name.startswith(start) or (path.name.startswith(".") and not start.startswith(".")):
        return False
    try:
        return path.is_dir() or is_data_file(path)
    except OSError:
        return False
