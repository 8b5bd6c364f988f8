"""Rows of data files, each with its place: JSON lines, JSON lists, CSV, TSV, Parquet and Arrow, one file or a
folder of shards, gzipped or not, or a data set of the Hub. What a row means is planner.data.rows' to say.

Every row is handed over with the types that it has itself: no column's type is guessed from the rows before
it, as datasets' JSON reader does from the first 10 MiB of a file.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from planner.base.errors import InputError, MissingExtraError, shorten
from planner.data.hub_data import HubName, cached_batches, cached_files, fetched, hub_name

Rows = Iterator[tuple[str, object]]
MAX_LINE_BYTES = 64 * 2**20
MAX_JSON_BYTES = 2 * 2**30
# The greatest that Python's csv takes on every platform: a C long is 32 bits wide on Windows.
MAX_FIELD_CHARACTERS = 2**31 - 1
ROWS_AT_A_TIME = 1000
KINDS = ".jsonl, .json, .csv, .tsv (each also .gz), .parquet, .arrow, or a folder of such files"
# The Hub's names of shards: train-00000-of-00002.parquet.
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+")


def data_files(path: Path) -> tuple[Path, ...]:
    """The files that a data file, folder or data set of the Hub consists of, in the order they are read in.

    Raises:
        InputError: a folder without data files, or of several splits or kinds, of which none may be guessed;
            or a data set that is not in the Hub's cache.
        OSError: the folder cannot be read.
        MissingExtraError: as read_rows.
    """
    if not path.is_dir():
        name = named_on_hub(path)
        return (path,) if name is None else cached_files(name)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(each.parent.name for each in path.glob("*/state.json"))
        if len(splits) != 1:
            raise InputError(
                f"{path}: holds the splits {', '.join(splits) or 'none'}; name the folder of one"
            )
        path = path / splits[0]
    if (path / "state.json").is_file():
        return _saved_files(path)
    found = sorted(each for each in path.iterdir() if each.is_file() and _reader(each) is not None)
    found = [each for each in found if each.name != "dataset_info.json" and not each.name.startswith(".")]
    if not found:
        raise InputError(f"{path}: a folder without data files; expected {KINDS}")
    kinds = sorted({_kind(each) for each in found})
    if len(kinds) > 1:
        raise InputError(f"{path}: holds files of several kinds ({', '.join(kinds)}); name one file")
    shards = [_SHARD.match(each.name) for each in found]
    splits = sorted({shard["split"] for shard in shards if shard is not None})
    named = sorted({each.name.partition(".")[0] for each in found} & {"train", "test", "validation", "eval"})
    if len(splits) > 1 or (named and len(found) > 1):
        raise InputError(
            f"{path}: holds several splits ({', '.join(splits or named)}); name the files of one"
        )
    return tuple(found)


def named_on_hub(path: Path) -> HubName | None:
    """The data set of the Hub that is meant by what is no file here; None for a file's name."""
    return hub_name(str(path)) if _reader(path) is None else None


def is_data_file(path: Path) -> bool:
    """Whether a file's name is that of a kind of data that is read."""
    return _reader(path) is not None


def on_this_machine(text: str, *, allow_network: bool = False) -> str:
    """The name by which data is read: a path as it is; of a data set of the Hub the name with configuration
    and split, once it is in the cache, into which it is fetched where that is allowed.

    Raises:
        InputError: it is not here and may not be fetched, or cannot be, or has no such split.
        MissingExtraError: it is on the Hub, and the package that reads those is not there.
    """
    name = hub_name(text) if _reader(Path(text)) is None else None
    return text if name is None else str(fetched(name, allow_network=allow_network))


def read_rows(path: Path) -> Rows:
    """(place, row) of every row of a file, of a folder's files or of a data set of the Hub.

    Raises:
        InputError: it cannot be read; one line that names the place.
        MissingExtraError: a Parquet or Arrow file or a data set of the Hub, and the package that reads those
            is not there.
    """
    name = named_on_hub(path)
    if name is not None:
        yield from _table_rows(cached_batches(name, ROWS_AT_A_TIME))
        return
    try:
        files = data_files(path)
        for each in files:
            reader = _reader(each)
            if reader is None:
                raise InputError(f"{each}: unknown kind of data file; expected {KINDS}")
            before = f"{each.name}: " if path.is_dir() else ""
            for place, row in reader(each):
                yield before + place, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def parse_json(content: bytes, where: str) -> object:
    """What JSON text says.

    Raises:
        InputError: it is no JSON; the line names `where` and the column.
    """
    try:
        parsed: object = json.loads(content.removeprefix(BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: JSON out of bounds: {error}") from error
    return parsed


def _saved_files(folder: Path) -> tuple[Path, ...]:
    """The files of datasets' save_to_disk, which its state.json lists."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return tuple(folder / Path(each["filename"]).name for each in state["_data_files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'state.json'}: not of a saved data set: {error}") from error


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def _reader(path: Path) -> Callable[[Path], Rows] | None:
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
    }
    if not path.name.lower().endswith(".gz"):
        readers |= {".parquet": _parquet_rows, ".arrow": _arrow_rows}
    return readers.get(_kind(path))


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return path.open("rb")


def _gzip_error(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: a broken gzip file: {error}")


def _jsonl_rows(path: Path) -> Rows:
    try:
        with _open(path) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                place = f"line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(f"{path}: {place}: longer than {MAX_LINE_BYTES // 2**20} MiB")
                if line.strip():
                    yield place, parse_json(line.rstrip(b"\r\n"), f"{path}: {place}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _gzip_error(path, error) from error


def _json_rows(path: Path) -> Rows:
    """A list of examples; or, where the file begins with an object, one example a line."""
    try:
        with _open(path) as file:
            first = file.read(2**16).removeprefix(BOM_UTF8).lstrip()[:1]
        if first == b"{":
            yield from _json_lines(path)
            return
        with _open(path) as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _gzip_error(path, error) from error
    if len(content) > MAX_JSON_BYTES:
        raise InputError(f"{path}: larger than {MAX_JSON_BYTES // 2**30} GiB; use .jsonl, one example a line")
    if not content.strip():
        return
    parsed = parse_json(content, str(path))
    if not isinstance(parsed, list):
        raise InputError(f"{path}: expected a JSON list of examples, or one example a line")
    for number, row in enumerate(parsed, start=1):
        yield f"example {number}", row


def _json_lines(path: Path) -> Rows:
    rows = _jsonl_rows(path)
    try:
        first = next(rows)
    except InputError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise InputError(
            f"{path}: expected a JSON list of examples, or one example a line ({said})"
        ) from error
    yield first
    yield from rows


def _csv_rows(path: Path) -> Rows:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    separator = "\t" if _kind(path) == ".tsv" else ","
    opener: Callable[..., IO[str]] = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, delimiter=separator)
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"{path}: {place}: not as many values as the header has names")
                yield place, row
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    except csv.Error as error:
        raise InputError(f"{path}: not a {_kind(path)[1:].upper()} file: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _gzip_error(path, error) from error


def _parquet_rows(path: Path) -> Rows:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("reading Parquet", "the package pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:
            yield from _table_rows(file.iter_batches(batch_size=ROWS_AT_A_TIME))
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file: {shorten(str(error))}") from error


def _arrow_rows(path: Path) -> Rows:
    """Arrow's stream format, as datasets writes it, or its file format."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingExtraError("reading Arrow files", "the package pyarrow") from error
    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                yield from _table_rows(file.get_batch(each) for each in range(file.num_record_batches))
                return
            source.seek(0)
            yield from _table_rows(pa.ipc.open_stream(source))
    except pa.ArrowException as error:
        raise InputError(f"{path}: not an Arrow file: {shorten(str(error))}") from error


def _table_rows(batches: Iterator[Any]) -> Rows:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
            for row in batch.slice(start, ROWS_AT_A_TIME).to_pylist():
                number += 1
                yield f"row {number}", {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A table gives every object the keys of all, null where it has none: those are taken out."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
