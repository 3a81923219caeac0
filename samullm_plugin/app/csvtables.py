"""CSV files, read by pyarrow in blocks; a bad row of theirs costs one row."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samullm_plugin.errors import InputError
from samullm_plugin.files import UTF_16

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import csv

CSV_BLOCK_BYTES = 4 << 20
"""Bytes of a CSV file that are parsed at a time."""


_CSV_TYPES = (  # a column is of the first type that all of its cells are written as
    ("int64", r"^-?(0|[1-9][0-9]{0,17})$"),
    ("double", r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$"),
    ("bool", r"^(true|false|True|False)$"),
)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of a file that cannot be read; the rest of the file can.

    Attributes:
        number: of the row, from 1.
        reason: what is wrong with it.
    """

    number: int
    reason: str


def opened(path: Path) -> Any:
    """Return a file open for reading bytes, unpacked if its name ends in ``.gz`` or ``.zst``."""
    import pyarrow as pa

    return pa.input_stream(str(path), compression="detect")


def csv_batches(path: Path, text_columns: Sequence[str]) -> Iterator[pa.RecordBatch | BadRow]:
    """Yield the batches of a CSV file, read twice: first to see what its columns are.

    A column is numbers (or truth values) if every cell that is not empty is written as one is:
    ``007`` and ``1,000`` stay texts. Empty cells are nulls in such columns, empty texts in others.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    fitting: dict[str, list[tuple[str, str]]] = {}
    encoding = "utf8" if _is_utf_8(path) else "latin1"  # in which every byte is a character
    for batch in _csv_texts(path, {}, encoding):
        if isinstance(batch, BadRow):
            continue
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            kinds = fitting.setdefault(name, [] if name in text_columns else list(_CSV_TYPES))
            if kinds:
                cells = column.filter(pc.not_equal(column, ""))
                fits = (pc.all(pc.match_substring_regex(cells, k[1])).as_py() for k in kinds)
                kinds[:] = [k for k, fit in zip(kinds, fits, strict=True) if fit is not False]
    types = {
        name: pa.type_for_alias(kinds[0][0])
        for name, kinds in fitting.items()
        if kinds and len(kinds) < len(_CSV_TYPES)  # a column without any cell says nothing
    }
    yield from _csv_texts(path, types, encoding)


def _csv_texts(
    path: Path, types: Mapping[str, Any], encoding: str
) -> Iterator[pa.RecordBatch | BadRow]:
    """Yield the batches of a CSV file and its bad rows; columns without a type are texts."""
    import pyarrow as pa
    from pyarrow import csv

    bad: list[BadRow] = []

    def note(row: csv.InvalidRow) -> str:
        reason = f"has {row.actual_columns} cells, and the file {row.expected_columns} columns"
        bad.append(BadRow(row.number - 1, reason))  # the header is one as well
        return "skip"

    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note)
    read = csv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False, encoding=encoding)
    with opened(path) as head:
        names = csv.open_csv(head, parse_options=parse, read_options=read).schema.names
    told = [_utf_8(n).removeprefix("\ufeff") for n in names] if encoding != "utf8" else names
    if twice := sorted({n for n in told if told.count(n) > 1}):
        raise InputError(f"{path}: the column {twice[0]!r} is there twice; rename one")
    convert = csv.ConvertOptions(
        column_types={n: types.get(t, pa.string()) for n, t in zip(names, told, strict=True)},
        null_values=[""],
        strings_can_be_null=False,
    )
    bad.clear()
    done = 0
    with opened(path) as data:
        for batch in csv.open_csv(
            data, parse_options=parse, read_options=read, convert_options=convert
        ):
            found, wrong = (batch, {}) if encoding == "utf8" else _as_utf_8(batch, told)
            for piece in _with_bad_rows(found, wrong, done, bad):
                done += 1 if isinstance(piece, BadRow) else piece.num_rows
                yield piece
    yield from bad


def _with_bad_rows(
    batch: pa.RecordBatch, wrong: Mapping[int, str], done: int, bad: list[BadRow]
) -> Iterator[pa.RecordBatch | BadRow]:
    """Yield a batch in parts, with the bad rows that stand before and between its rows.

    Args:
        batch: rows of a file.
        wrong: those of them that are bad, by their place, and why.
        done: rows of the file before them.
        bad: rows that were left out, in order; those that are yielded are removed.
    """
    first = 0
    for at in range(batch.num_rows if bad or wrong else 0):
        while bad and bad[0].number <= done + 1:
            if at > first:
                yield batch.slice(first, at - first)
            first = at
            done += 1
            yield bad.pop(0)
        done += 1
        if at in wrong:
            if at > first:
                yield batch.slice(first, at - first)
            first = at + 1
            yield BadRow(done, wrong[at])
    if first < batch.num_rows:
        yield batch.slice(first)


def _is_utf_8(path: Path) -> bool:
    """Return whether a file is UTF-8 throughout.

    Raises:
        InputError: if it is UTF-16.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with opened(path) as data:
            part = data.read(CSV_BLOCK_BYTES)
            if part[:2] in UTF_16:
                raise InputError(f"{path}: is UTF-16; write it as UTF-8")
            while part:
                decoder.decode(part)
                part = data.read(CSV_BLOCK_BYTES)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _utf_8(text: str) -> str:
    """Return a text that was read byte by byte."""
    return text.encode("latin1").decode()


def _as_utf_8(
    batch: pa.RecordBatch, names: Sequence[str]
) -> tuple[pa.RecordBatch, Mapping[int, str]]:
    """Return rows whose texts were read byte by byte, and which of them are no UTF-8."""
    import pyarrow as pa

    wrong: dict[int, str] = {}
    columns = []
    for name, column in zip(names, batch.columns, strict=True):
        if pa.types.is_string(column.type):
            texts = []
            for at, cell in enumerate(column.to_pylist()):
                try:
                    texts.append(_utf_8(cell))
                except UnicodeDecodeError:
                    texts.append("")
                    wrong.setdefault(
                        at, f"its column {name!r} is not UTF-8; write the file as UTF-8"
                    )
            columns.append(pa.array(texts, pa.string()))
        else:
            columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=list(names)), wrong
