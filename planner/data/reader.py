"""Training data: rows of files (planner.data.files) as typed examples of one format (planner.data.rows), with
the place of every mistake. docs/data.md lists what is read and what is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from planner.base.errors import InputError
from planner.data.examples import (
    FORMATS,
    Conversation,
    Example,
    Message,
    PlainText,
    PromptCompletion,
    TrainingData,
    estimated_stats,
)
from planner.data.files import read_rows
from planner.data.image_rule import ImageRule
from planner.data.lengths import DatasetStats
from planner.data.rows import example_of, form_of, format_of

__all__ = [
    "FORMATS",
    "Conversation",
    "Example",
    "Message",
    "PlainText",
    "PromptCompletion",
    "TrainingData",
    "check_rows",
    "estimate_file",
    "estimate_stats",
    "mistakes",
    "read_training_data",
]


def read_training_data(path: Path) -> TrainingData:
    """Read a data file, or a folder of shards.

    Raises:
        InputError: it cannot be read, or an example is not usable; one line that names the place.
        MissingExtraError: a table whose package is not installed.
    """
    return check_rows(read_rows(path), source=str(path))


def check_rows(rows: Iterable[tuple[str, object]], *, source: str) -> TrainingData:
    """Check rows given as (place, row) and turn them into examples of one format.

    Raises:
        InputError: no row at all, or a row that is not usable; one line with `source` and the place.
    """
    formats: set[str] = set()
    examples: list[Example] = []
    left_out: dict[str, None] = {}
    for data_format, example in _checked(rows, source, left_out):
        formats.add(data_format)
        examples.append(example)
    return TrainingData(
        format=formats.pop(), examples=tuple(examples), source=source, left_out=tuple(left_out)
    )


def estimate_file(path: Path, rule: ImageRule | None = None) -> DatasetStats:
    """Lengths of a data file or folder, estimated as estimate_stats does, holding no example; with the tokens
    that a model's `rule` makes of images.

    Raises:
        InputError: as read_training_data.
        MissingExtraError: as read_training_data.
    """
    left_out: dict[str, None] = {}
    return estimated_stats(_checked(read_rows(path), str(path), left_out), left_out, str(path), rule)


def estimate_stats(data: TrainingData, rule: ImageRule | None = None) -> DatasetStats:
    """Lengths estimated from the size of the text, without a tokenizer; marked as an estimate."""
    examples = ((data.format, example) for example in data.examples)
    return estimated_stats(examples, data.left_out, data.source, rule)


def mistakes(path: Path, *, most: int) -> tuple[str, ...]:
    """The first mistakes of a data file, each in a line with its place; none of one that can be read.

    What leaves no next row, such as a line that is no JSON, is the last of them.

    Raises:
        MissingExtraError: as read_training_data.
    """
    found: list[str] = []
    check = _Check(str(path), {})
    try:
        for place, row in read_rows(path):
            try:
                check.take(place, row)
            except InputError as error:
                found.append(str(error))
                if len(found) == most:
                    return tuple(found)
        if not found:
            check.end()
    except InputError as error:
        found.append(str(error))
    return tuple(found)


def _checked(
    rows: Iterable[tuple[str, object]], source: str, left_out: dict[str, None]
) -> Iterator[tuple[str, Example]]:
    """Each row's format and example; all of one form, at least one."""
    check = _Check(source, left_out)
    for place, row in rows:
        yield check.take(place, row)
    check.end()


class _Check:
    """Turns rows into examples, all of the form of the first."""

    def __init__(self, source: str, left_out: dict[str, None]) -> None:
        self._source = source
        self._left_out = left_out
        self._form: str | None = None
        path = Path(source)
        self._folder = path if path.is_dir() else path.parent

    def take(self, place: str, row: object) -> tuple[str, Example]:
        """A row's format and example.

        Raises:
            InputError: it is none, or of another form than those before.
        """
        where = f"{self._source}: {place}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
        form = form_of(row, where)
        if self._form is None:
            self._form = form
        elif form != self._form:
            raise InputError(
                f"{where}: has {form}, but the examples before it have {self._form}; use one format"
            )
        return format_of(form), example_of(row, form, where, self._left_out, self._folder)

    def end(self) -> None:
        """See that there was a row.

        Raises:
            InputError: there was none.
        """
        if self._form is None:
            raise InputError(f"{self._source}: no examples in it")
