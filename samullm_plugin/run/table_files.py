"""Files of the joined table, written while the run goes on or afterwards.

Parts of :data:`PART_ROWS` rows, fewer where rows are long, are written while the run goes on, each
once all requests of its items are settled; at the end they become one file. Nothing but one part is
held in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from pydantic_core import to_json

from samullm_plugin.app.loaded import LoadedApplication, NodeSource
from samullm_plugin.errors import InputError, RunError
from samullm_plugin.files import arrow_input, arrow_output
from samullm_plugin.run.columns import find_columns
from samullm_plugin.run.joined import JoinedTable, as_text
from samullm_plugin.run.rows import RunRows

if TYPE_CHECKING:
    import pyarrow as pa

PART_ROWS = 8192
PART_BYTES = 64 << 20
"""About the bytes that the inputs in a part may take."""
LOOK_EVERY_S = 2.0
"""Seconds between two looks at the journal of a run that goes on."""

TableFormat = Literal["parquet", "csv", "jsonl"]
_SUFFIXES: Mapping[str, TableFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


def table_format(path: Path, given: str | None = None) -> TableFormat:
    """Return the format of a table to write.

    Raises:
        InputError: if neither the name nor ``given`` tells one.
    """
    found = given or _SUFFIXES.get(path.suffix.lower())
    known = get_args(TableFormat)
    if found not in known:
        raise InputError(
            f"{path}: the table's format {found or path.suffix!r} is none of {', '.join(known)}; "
            "name the file .parquet, .csv or .jsonl, or give --format"
        )
    result: TableFormat = found  # type: ignore[assignment]  # it is one of them
    return result


class TableParts:
    """Writes parts of a table as they are complete, and the whole file at the end."""

    def __init__(self, table: JoinedTable, folder: Path) -> None:
        """Begin with no part written.

        Args:
            table: what to write.
            folder: of the parts; what an interrupted run left there is written anew.
        """
        self.table, self._folder = table, folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        most = int(PART_BYTES / max(1.0, table.rows.item_bytes))
        self._rows = min(PART_ROWS, max(1, most))
        self._left = list(range(0, len(table), self._rows))

    def advance(self) -> None:
        """Read on in the journal and write the parts that have become complete."""
        if not self.table.rows.advance() or not self._left:
            return
        starts = np.arange(0, len(self.table), self._rows)
        waiting = np.add.reduceat(self.table.unsettled(), starts)
        for first in [f for f in self._left if waiting[f // self._rows] == 0]:
            self._write(first)

    def _write(self, first: int) -> None:
        import pyarrow.parquet as pq

        part = self.table.part(first, min(first + self._rows, len(self.table)))
        path = self._folder / f"part-{first // self._rows:05d}.parquet"
        with arrow_output(path.with_suffix(".tmp")) as file:
            pq.write_table(part, file, compression="zstd")
        path.with_suffix(".tmp").replace(path)
        self._left.remove(first)

    def finish(self, file: Path, kind: TableFormat) -> None:
        """Write what is left, and one file with all parts in order; the parts go.

        Raises:
            RunError: if the file cannot be written.
        """
        self.table.rows.advance()
        for first in list(self._left):
            self._write(first)
        parts = sorted(self._folder.glob("part-*.parquet"))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.part")
            _join_parts(parts, partial, kind)
            partial.replace(file)
        except OSError as error:
            raise RunError(f"{file}: cannot be written: {error.strerror or error}") from error
        shutil.rmtree(self._folder, ignore_errors=True)


def _join_parts(parts: Sequence[Path], file: Path, kind: TableFormat) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    schema = _common([pq.read_schema(arrow_input(p)) for p in parts], flat=kind == "csv")
    if kind == "jsonl":
        with file.open("wb") as lines:
            for path in parts:
                for row in pq.read_table(arrow_input(path)).to_pylist():
                    lines.write(to_json(row, inf_nan_mode="null") + b"\n")
        return
    with arrow_output(file) as output:
        writer = (
            pq.ParquetWriter(output, schema, compression="zstd")
            if kind == "parquet"
            else pa.csv.CSVWriter(output, schema)
        )
        with writer:
            for path in parts:
                writer.write_table(_cast(pq.read_table(arrow_input(path)), schema))


def concatenated(parts: Sequence[pa.Table]) -> pa.Table:
    """Return parts of one table as one; columns that are not of one type become texts."""
    import pyarrow as pa

    schema = _common([p.schema for p in parts], flat=False)
    return pa.concat_tables([_cast(p, schema) for p in parts]) if parts else pa.table({})


def _common(schemas: Sequence[pa.Schema], *, flat: bool) -> pa.Schema:
    """Return one schema for all parts; columns that are not of one type become texts."""
    import pyarrow as pa

    fields = []
    for name in schemas[0].names if schemas else ():
        kinds = [pa.schema([s.field(name)]) for s in schemas]
        try:
            kind = pa.unify_schemas(kinds, promote_options="permissive").field(name).type
        except pa.ArrowException:
            kind = pa.string()
        if pa.types.is_null(kind) or (flat and pa.types.is_nested(kind)):
            kind = pa.string()
        fields.append(pa.field(name, kind))
    return pa.schema(fields)


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = []
    for field in schema:
        column = table[field.name]
        if pa.types.is_string(field.type) and not pa.types.is_string(column.type):
            column = pa.chunked_array([[as_text(v) for v in column.to_pylist()]], pa.string())
        elif column.type != field.type:
            column = pa.chunked_array([pa.array(column.to_pylist(), field.type)], field.type)
        columns.append(column)
    return pa.table(columns, schema=schema)


class TableError(RunError):
    """The joined table could not be written; everything else of the run can."""


class LiveTable:
    """Writes parts of a table in a thread of its own while the run goes on.

    Attributes:
        complete: the run has got to its end, so that the file is to be written.
    """

    def __init__(self, parts: TableParts) -> None:
        """Write nothing before :meth:`start`."""
        self.complete = False
        self._parts = parts
        self._ended = Event()
        self._error: Exception | None = None
        self._thread = Thread(target=self._follow, name="samullm-table", daemon=True)

    def start(self) -> None:
        """Begin to follow the journal."""
        self._thread.start()

    def _follow(self) -> None:
        try:
            while not self._ended.wait(LOOK_EVERY_S):
                self._parts.advance()
        except Exception as error:  # told at the end; the run itself goes on
            self._error = error

    def stop(self) -> Exception | None:
        """Stop following; return what went wrong."""
        self._ended.set()
        self._thread.join()
        return self._error


@contextmanager
def live_table(loaded: LoadedApplication, directory: Path) -> Iterator[LiveTable | None]:
    """Have the joined table written that an application asks for.

    Yields:
        The table, or None if none is asked for.

    Raises:
        TableError: if it could not be written.
    """
    output = loaded.output
    if output is None or loaded.sources is None:
        yield None
        return
    file = directory / output.file
    rows = RunRows(directory)
    try:
        parts = TableParts(JoinedTable(rows, output.columns, output.rows), _parts_of(file))
        live = LiveTable(parts)
        live.start()
        try:
            yield live
        finally:
            error = live.stop()
        if live.complete:
            if error is None:
                try:
                    parts.finish(file, table_format(file))
                except Exception as failure:  # of the disk or a library; the run itself is whole
                    error = failure
            if error is not None:
                raise TableError(
                    f"{file}: the joined table could not be written: {error}; every result is in "
                    f"the journal: samullm export {directory} --output {file}"
                ) from error
    finally:
        rows.close()


def _output_fields(source: NodeSource) -> frozenset[str] | None:
    """Return the fields that outputs of a node have; None: nobody knows."""
    return None if source.schema is None or source.check else source.schema.properties


def check_output(loaded: LoadedApplication) -> None:
    """Refuse a joined table that could not be written, before anything starts.

    Raises:
        InputError: naming the field.
    """
    output = loaded.output
    if output is None:
        return
    where = loaded.path or f"application {loaded.app.name}"
    path = Path(output.file)
    if loaded.sources is None:
        raise InputError(f"{where}: output: the application has no texts to make a table of")
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"{where}: output.file: {output.file!r} leads out of the run's directory; name a file "
            "in it (samullm export writes elsewhere)"
        )
    sources = loaded.sources
    names = [n.name for n in loaded.app.all_nodes]
    nodes = {n: _output_fields(s) for n, s in zip(names, sources, strict=True)}
    first = next((s for s in sources if s.ids[:1] == s.items[:1]), sources[0])
    try:
        table_format(path)
        try:
            find_columns(output.columns, nodes, _names(first.fields[:1]), output.rows)
        except InputError:  # it may be a field of other rows
            rows = (fields for source in sources for fields in source.fields)
            find_columns(output.columns, nodes, _names(rows), output.rows)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of all fields of rows."""
    found: dict[str, None] = {}
    for row in rows:
        if not row.keys() <= found.keys():
            found |= dict.fromkeys(row)
    return [n for n in found if n != "id"]


def _parts_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.parts")


def export_table(
    run: Path,
    file: Path,
    kind: TableFormat,
    columns: Sequence[str] = (),
    rows_of: str | None = None,
) -> int:
    """Write the joined table of a run, finished or not; return its number of rows.

    Raises:
        InputError: if the folder holds no run, or a column is not there.
        RunError: if the file cannot be written.
    """
    rows = RunRows(run)
    try:
        table = JoinedTable(rows, columns, rows_of)
        TableParts(table, file.with_name(f".{file.name}.{os.getpid()}")).finish(file, kind)
        return len(table)
    finally:
        rows.close()
