"""Rows of tables: CSV, Parquet and Arrow files, folders of shards, and datasets.

Read by pyarrow in chunks: a table may be larger than memory as long as what is made of its rows is
not. JSON lines have a reader of their own (``app/requests.py``).
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import unquote

import pydantic

from samullm_plugin.app.csvtables import BadRow, csv_batches
from samullm_plugin.errors import InputError, MissingExtraError, suggest

if TYPE_CHECKING:
    import pyarrow as pa

    Column = tuple[str, pa.Array, bool]
    """A column, after its name, and whether its values are as JSON has them."""

    Batches = Iterator[tuple[str, pa.RecordBatch]]
    """Record batches, each with the file it comes from."""
    Pieces = Iterator[tuple[str, "pa.RecordBatch | BadRow"]]
    """Record batches and rows that are none, in order, each with the file it comes from."""

Format = Literal["jsonl", "csv", "parquet", "arrow"]

CHUNK_ROWS = 4096
"""The most rows that are held as Python objects at a time."""

CHUNK_BYTES = 4 << 20
"""And about their bytes, unless it is one row."""


_SUFFIXES: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_PACKED = (".gz", ".zst")
_OTHERS = frozenset({".xlsx", ".xls", ".ods", ".bz2", ".xz", ".zip", ".7z", ".avro", ".orc", ".db"})
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_IMAGES = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"))


def format_of(path: Path) -> Format | None:
    """Return what a file's name says about its format; None if nothing."""
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        suffix = Path(path.stem).suffix.lower()
    return _SUFFIXES.get(suffix)


def shards(path: Path, given: Format | None, where: str) -> list[tuple[Path, Format]]:
    """Return the files of a table in order, each with its format.

    Args:
        path: a file, or a folder with files of one format, in its sub-folders as well; names that
            begin with ``.`` or ``_`` are left out.
        given: the format where names do not tell it.
        where: file and field, for messages.

    Raises:
        InputError: for a missing file, a format nobody told, or a folder of several formats.
    """
    if not path.exists():
        raise InputError(f"{path}: there is no such requests file")
    if not path.is_dir():
        if given is None and path.suffix.lower() in _OTHERS:
            raise InputError(
                f"{path}: {path.suffix} files are not read; save it as CSV, Parquet or JSON lines "
                f"(packed: {' or '.join(_PACKED)})"
            )
        return [(path, given or format_of(path) or "jsonl")]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        raise InputError(
            f"{path}: is a dataset as save_to_disk writes it; say `dataset`, not `file`"
        )
    names = sorted(
        p
        for p in path.rglob("*")
        if p.is_file() and not any(s.startswith((".", "_")) for s in p.relative_to(path).parts)
    )
    found = [(p, f) for p in names if (f := given or format_of(p)) is not None]
    if not found:
        raise InputError(
            f"{path}: the folder holds no table; formats are known by the files' names "
            f"({', '.join(_SUFFIXES)}), or by `format`"
        )
    kinds = sorted({f for _, f in found})
    if len(kinds) > 1:
        raise InputError(
            f"{path}: the folder holds files of several formats ({', '.join(kinds)}); say in "
            f"{where} which with `format`, or name one file"
        )
    return found


def file_batches(path: Path, kind: Format, text_columns: Sequence[str] = ()) -> Pieces:
    """Yield the record batches of one file, and between them its rows that are none.

    Args:
        path: a CSV, Parquet or Arrow file.
        kind: its format.
        text_columns: columns that stay text in a CSV file, whatever they look like.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    import pyarrow as pa

    readers: Mapping[str, Callable[[Path, Sequence[str]], Iterator[pa.RecordBatch | BadRow]]]
    readers = {"csv": csv_batches, "parquet": _parquet_batches, "arrow": _arrow_batches}
    try:
        for batch in readers[kind](path, text_columns):
            yield str(path), batch
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: cannot be read as {kind}: {reason}; say what it is with `format` "
            f"({', '.join(get_args(Format))})"
        ) from error


def _parquet_batches(path: Path, text_columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    del text_columns
    with pq.ParquetFile(path, memory_map=True) as file:
        yield from file.iter_batches(batch_size=CHUNK_ROWS, use_threads=False)


def _arrow_batches(path: Path, text_columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file, of the file or the stream format."""
    import pyarrow as pa

    del text_columns
    with pa.OSFile(str(path)) as data:  # not mapped: rows are read later, the file may change
        if data.read(6) == b"ARROW1":
            data.seek(0)
            with pa.ipc.open_file(data) as file:
                for k in range(file.num_record_batches):
                    yield file.get_batch(k)
        else:
            data.seek(0)
            with pa.ipc.open_stream(data) as stream:
                yield from stream


def partition_of(file: Path, table: Path) -> Mapping[str, str | int | None]:
    """Return the fields of a file's rows that folders between it and its table's name.

    ``lang=de/0.parquet`` is how pyarrow, Spark and Hive write tables in parts.
    """
    found: dict[str, str | int | None] = {}
    for name, equals, value in (p.partition("=") for p in file.relative_to(table).parts[:-1]):
        if name and equals:
            number = re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", value)
            text = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
            found[unquote(name)] = int(value) if number else text
    return found


def with_fields(pieces: Pieces, fields: Mapping[str, str | int | None]) -> Pieces:
    """Yield batches with further columns, each of one value; their own columns stay."""
    import pyarrow as pa

    for name, batch in pieces:
        if not isinstance(batch, BadRow):
            for field, value in fields.items():
                if field not in batch.schema.names:
                    column = pa.array([value] * batch.num_rows)
                    batch = batch.append_column(field, column)  # noqa: PLW2901  # the same rows
        yield name, batch


def dataset_batches(
    name: str, config: str | None, split: str | None, base: Path, where: str
) -> Pieces:
    """Yield the batches of a Hugging Face dataset.

    Args:
        name: a folder that ``Dataset.save_to_disk`` wrote, relative to ``base``; else the name of
            a dataset on the hub, for which the package ``datasets`` is needed.
        config: which configuration of a dataset on the hub; None: the only one.
        split: which split; None: the only one.
        base: folder that paths are relative to.
        where: file and field, for messages.

    Raises:
        InputError: naming what is missing.
    """
    folder = base / name
    if not folder.is_dir():
        yield from _hub_batches(name, config, split, where)
        return
    if config is not None:
        raise InputError(f"{where}.config: {folder} is a folder, which has no configurations")
    if (folder / "dataset_dict.json").is_file():
        known = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split is None and len(known) == 1:
            split = known[0]
        if split is None or split not in known:
            asked = "say which" if split is None else f"no {split!r}{suggest(split, known)}"
            raise InputError(f"{where}.split: {asked}; splits: {', '.join(known)}")
        folder /= split
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / f["filename"] for f in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: is no dataset as save_to_disk writes it (state.json); for a folder of CSV, "
            "Parquet or Arrow files write `file` instead of `dataset`"
        ) from error
    for file in files:
        yield from file_batches(file, "arrow")


def _hub_batches(name: str, config: str | None, split: str | None, where: str) -> Batches:
    """Yield the batches of a dataset that ``datasets`` loads by its name."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"{where}: {name!r} is no folder; a dataset of the hub", "datasets", "datasets"
        ) from error
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # whatever the hub's client raises
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: dataset {name!r} cannot be loaded: {reason}") from error
    if isinstance(found, dict):
        if len(found) != 1:
            raise InputError(f"{where}.split: say which; splits: {', '.join(found)}")
        found = next(iter(found.values()))
    yield from stored_batches(found, name)


def stored_batches(dataset: Any, name: str) -> Batches:
    """Yield the batches of a dataset that ``datasets`` has opened."""
    for part in dataset.with_format("arrow").iter(batch_size=CHUNK_ROWS):
        for batch in part.to_batches():
            yield name, batch


def numbered_batches(
    batches: Pieces,
) -> Iterator[tuple[str, range, pa.RecordBatch | BadRow]]:
    """Yield (file, numbers of the rows in it, rows), rows that can well be held as objects."""
    done, last = 0, ""
    for name, batch in batches:
        if name != last:
            done, last = 0, name
        if isinstance(batch, BadRow):
            done += 1
            yield name, range(done, done + 1), batch
            continue
        each = _num_bytes(batch) / max(1, batch.num_rows)
        size = max(1, min(CHUNK_ROWS, int(CHUNK_BYTES / max(1.0, each))))
        for first in range(0, batch.num_rows, size):
            part = batch.slice(first, size)
            yield name, range(done + 1, done + part.num_rows + 1), part
            done += part.num_rows


def _num_bytes(batch: pa.RecordBatch) -> int:
    """Return the bytes of a batch, at most all of what it is a part of."""
    import pyarrow as pa

    try:
        return int(batch.nbytes)
    except pa.ArrowTypeError:  # of views, before pyarrow 24
        return int(batch.get_total_buffer_size())


def is_text(kind: pa.DataType) -> bool:
    """Return whether all values of a column's type are texts."""
    import pyarrow.types as of

    return bool(of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind))


def is_plain(kind: pa.DataType) -> bool:
    """Return whether JSON has all values of a column's type as they are."""
    import pyarrow.types as of

    tests = (is_text, of.is_integer, of.is_floating, of.is_boolean, of.is_null)
    return any(test(kind) for test in tests)


def batch_rows(batch: pa.RecordBatch, where: Callable[[int], str]) -> Iterator[dict[str, Any]]:
    """Yield the fields of every row, values as JSON has them.

    Args:
        batch: the rows.
        where: tells file and number of a row.

    Raises:
        InputError: at the row that holds a value which JSON cannot hold.
    """
    names, columns = batch.schema.names, []
    bad: tuple[int, str, str] | None = None
    for name, column in zip(names, batch.columns, strict=True):
        values = column.to_pylist()
        if not is_plain(column.type):
            for at, value in enumerate(values):
                try:
                    values[at] = json_value(value)
                except TypeError as error:
                    if bad is None or at < bad[0]:
                        bad = at, name, str(error)
                    break
        columns.append(values)
    rows = zip(*columns, strict=True) if columns else repeat((), batch.num_rows)
    for row in islice(rows, None if bad is None else bad[0]):
        yield dict(zip(names, row, strict=True))
    if bad is not None:
        raise InputError(
            f"{where(bad[0])}: the column {bad[1]!r} holds {bad[2]}, which no prompt can take; "
            "leave the column out of the table, or make texts of it"
        )


def checked_columns(batch: pa.RecordBatch) -> list[Column]:
    """Return the columns of rows that :func:`batch_rows` has read, to read single ones."""
    pairs = zip(batch.schema.names, batch.columns, strict=True)
    return [(name, column, is_plain(column.type)) for name, column in pairs]


def checked_row(columns: Sequence[Column], at: int) -> dict[str, Any]:
    """Return the fields of one row, as :func:`batch_rows`."""
    return {
        name: column[at].as_py() if plain else json_value(column[at].as_py())
        for name, column, plain in columns
    }


def json_value(value: Any) -> Any:
    """Return a cell as JSON has it: times in ISO's form, decimals as texts, images as data URLs.

    Values of numpy are Python's. Bytes that are UTF-8 without control characters are texts: not
    every tool says so.

    Raises:
        TypeError: naming a type that JSON lacks.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list):
        pairs = all(isinstance(v, tuple) and len(v) == 2 for v in value)
        if value and pairs and all(isinstance(v[0], str) for v in value):  # a map of Arrow's
            return {k: json_value(v) for k, v in value}
        return [json_value(v) for v in value]
    if isinstance(value, tuple):
        return [json_value(v) for v in value]
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"} and value["bytes"] is not None:  # datasets' images
            return json_value(value["bytes"])
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        for magic, kind in _IMAGES:
            if value.startswith(magic):
                return f"data:image/{kind};base64,{base64.b64encode(value).decode()}"
        with suppress(UnicodeDecodeError):
            text = value.decode()
            if not _CONTROL.search(text):
                return text
    if isinstance(value, pydantic.BaseModel):
        return json_value(value.model_dump())
    if type(value).__module__ == "numpy":
        return json_value(value.tolist())
    raise TypeError(type(value).__name__)
