"""The joined table of a run: one row per item, with its inputs and what every node made of it.

Parts of :data:`PART_ROWS` rows are written while the run goes on, each once all requests of its
items are settled; at the end they become one file. Nothing but one part is held in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from pydantic_core import to_json

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.errors import InputError, RunError
from samullm_plugin.run.columns import FIGURES, find_columns
from samullm_plugin.run.rows import RunRows

if TYPE_CHECKING:
    import pyarrow as pa

PART_ROWS = 8192
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


class JoinedTable:
    """Makes rows of the joined table from a run's directory.

    Attributes:
        rows: the run.
        columns: what is shown.
    """

    def __init__(
        self, rows: RunRows, columns: Sequence[str] = (), rows_of: str | None = None
    ) -> None:
        """Find what the columns mean.

        Args:
            rows: the run.
            columns: as :func:`~samullm_plugin.run.columns.find_columns` takes them.
            rows_of: a node: one row per request of it; None: one per item.

        Raises:
            InputError: for a column or node that is not there.
        """
        self.rows = rows
        names = [n.name for n in rows.nodes]
        _, first = next(rows.items(), ("", {}))
        self.columns = find_columns(columns, names, list(first), rows_of)
        self._row_node = -1 if rows_of is None else names.index(rows_of)
        self._groups = [rows.by_item(i) for i in range(len(rows.nodes))]
        self._several = [
            bool(len(starts) > 1 and np.diff(starts).max(initial=0) > 1)
            for _, starts in self._groups
        ]

    def __len__(self) -> int:
        """Return the number of rows."""
        node = self._row_node
        return self.rows.num_items if node < 0 else len(self.rows.nodes[node])

    # Rows

    def unsettled(self) -> Any:
        """Return how many requests each row still waits for, shape ``(len(self),)``."""
        counts = np.zeros(self.rows.num_items, np.int64)
        for i, node in enumerate(self.rows.nodes):
            left = node.item[~self.rows.settled(i)]
            counts += np.bincount(left, minlength=self.rows.num_items)
        return counts if self._row_node < 0 else counts[self.rows.nodes[self._row_node].item]

    def part(self, first: int, last: int) -> pa.Table:
        """Return some rows; cells of requests that are not settled or not taken are null."""
        cells: dict[str, list[Any]] = {c.name: [] for c in self.columns}
        for row in self._rows(first, last):
            for column, value in zip(self.columns, row, strict=True):
                cells[column.name].append(value)
        import pyarrow as pa

        return pa.table({name: _array(values) for name, values in cells.items()})

    def _rows(self, first: int, last: int) -> Iterator[list[Any]]:
        if self._row_node < 0:
            for item, (name, fields) in zip(
                range(first, last), self.rows.items(first), strict=False
            ):
                yield self._row(name, fields, lambda i, item=item: self.of_item(i, item), {})
            return
        node = self.rows.nodes[self._row_node]
        inputs = _Items(self.rows)
        for r in range(first, last):
            item = int(node.item[r])
            _, fields = inputs.get(item)
            above = self.rows.ancestors(self._row_node, r)

            def requests(i: int, above: Any = above, item: int = item) -> list[int]:
                return above[i] if i in above else self.of_item(i, item)

            yield self._row(node.ids[r].as_py(), fields, requests, above)

    def of_item(self, node: int, item: int) -> list[int]:
        """Return the requests of a node that belong to an item."""
        order, starts = self._groups[node]
        found: list[int] = order[starts[item] : starts[item + 1]].tolist()
        return found

    def _row(
        self, name: str, fields: Mapping[str, Any], requests: Any, above: Mapping[int, list[int]]
    ) -> list[Any]:
        records: dict[int, list[Mapping[str, Any] | None]] = {}
        row = []
        for column in self.columns:
            i = column.node
            if i < 0:
                row.append(_inside(fields, column.path) if column.path else name)
                continue
            if i not in records:
                records[i] = [self.rows.record(i, r) for r in requests(i)]
            values = [_value(record, column.path) for record in records[i]]
            single = len(above[i]) == 1 if i in above else not self._several[i]
            if single or column.path == ("error",):
                kept = [v for v in values if v is not None]
                joined = "; ".join(dict.fromkeys(map(str, kept))) if len(kept) > 1 else None
                row.append(joined or (kept[0] if kept else None))
            else:
                row.append(values)
        return row


class _Items:
    """Inputs by item, read on in order and only anew when the order goes back."""

    def __init__(self, rows: RunRows) -> None:
        self._rows, self._at = rows, -1
        self._it = rows.items()
        self._last: tuple[str, dict[str, Any]] = ("", {})

    def get(self, item: int) -> tuple[str, dict[str, Any]]:
        if item < self._at:
            self._it, self._at = self._rows.items(item), item - 1
        while self._at < item:
            self._last = next(self._it)
            self._at += 1
        return self._last


def _value(record: Mapping[str, Any] | None, path: tuple[str, ...]) -> Any:
    """Return what a column shows of one request."""
    if record is None or record["kind"] == "skipped":
        return None
    made = record.get("value", record.get("text"))
    figure = len(path) == 1 and path[0] in FIGURES
    if figure and not (isinstance(made, Mapping) and path[0] in made and path[0] != "error"):
        return record.get(FIGURES[path[0]])
    return None if record["kind"] == "failed" else _inside(made, path)


def _inside(value: Any, path: Sequence[str]) -> Any:
    """Return a part of nested mappings; None where there is none."""
    for name in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _array(values: list[Any]) -> pa.Array:
    """Return values as a column; texts (JSON) where they are not of one type."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return pa.array([_text(v) for v in values], pa.string())


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return to_json(value, inf_nan_mode="null", fallback=str).decode()


# Parts and files


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
        self._left = list(range(0, len(table), PART_ROWS))

    def advance(self) -> None:
        """Read on in the journal and write the parts that have become complete."""
        if not self.table.rows.advance() or not self._left:
            return
        waiting = np.add.reduceat(self.table.unsettled(), np.arange(0, len(self.table), PART_ROWS))
        for first in [f for f in self._left if waiting[f // PART_ROWS] == 0]:
            self._write(first)

    def _write(self, first: int) -> None:
        import pyarrow.parquet as pq

        part = self.table.part(first, min(first + PART_ROWS, len(self.table)))
        path = self._folder / f"part-{first // PART_ROWS:05d}.parquet"
        pq.write_table(part, path.with_suffix(".tmp"), compression="zstd")
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
            raise RunError(f"{file}: cannot be written: {error.strerror}") from error
        shutil.rmtree(self._folder, ignore_errors=True)


def _join_parts(parts: Sequence[Path], file: Path, kind: TableFormat) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    schema = _common([pq.read_schema(p) for p in parts], flat=kind == "csv")
    if kind == "jsonl":
        with file.open("wb") as lines:
            for path in parts:
                for row in pq.read_table(path).to_pylist():
                    lines.write(to_json(row, inf_nan_mode="null") + b"\n")
        return
    writer = (
        pq.ParquetWriter(file, schema, compression="zstd")
        if kind == "parquet"
        else pa.csv.CSVWriter(file, schema)
    )
    with writer:
        for path in parts:
            writer.write_table(_cast(pq.read_table(path), schema))


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
            column = pa.chunked_array([[_text(v) for v in column.to_pylist()]], pa.string())
        elif column.type != field.type:
            column = pa.chunked_array([pa.array(column.to_pylist(), field.type)], field.type)
        columns.append(column)
    return pa.table(columns, schema=schema)


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
        RunError: if it could not be written; everything else of the run is there.
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
            if error is not None:
                raise RunError(
                    f"{file}: the joined table could not be written: {error}; every result is in "
                    f"the journal: samullm export {directory} --output {file}"
                ) from error
            parts.finish(file, table_format(file))
    finally:
        rows.close()


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
    fields = [n for n in loaded.sources[0].fields[0] if n != "id"] if loaded.sources else []
    try:
        table_format(path)
        find_columns(output.columns, [n.name for n in loaded.app.nodes], fields, output.rows)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


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
