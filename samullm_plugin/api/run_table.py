"""The joined table of a run as Python sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samullm_plugin.api.plans import html_table
from samullm_plugin.run.joined import JoinedTable
from samullm_plugin.run.rows import RunRows
from samullm_plugin.run.table_files import TableFormat, concatenated, export_table, table_format


class RunTable:
    """The joined table of a run; rows are read when they are asked for."""

    def __init__(self, directory: Path, columns: tuple[str, ...], rows: str | None) -> None:
        """Find the columns.

        Raises:
            InputError: for a column or node that is not there.
        """
        self._directory, self._columns, self._rows_of = directory, columns, rows
        with self._table() as table:
            self.columns = [c.name for c in table.columns]
            self._length = len(table)

    @contextmanager
    def _table(self) -> Iterator[JoinedTable]:
        rows = RunRows(self._directory)
        try:
            rows.advance()
            yield JoinedTable(rows, self._columns, self._rows_of)
        finally:
            rows.close()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._length

    def batches(self, size: int = 8192) -> Iterator[Any]:
        """Yield the rows as ``pyarrow.Table`` objects of at most ``size`` rows."""
        with self._table() as table:
            for first in range(0, len(table), size):
                yield table.part(first, min(first + size, len(table)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows as mappings."""
        for batch in self.batches():
            yield from batch.to_pylist()

    def head(self, count: int = 5) -> list[dict[str, Any]]:
        """Return the first rows as mappings."""
        with self._table() as table:
            rows: list[dict[str, Any]] = table.part(0, min(count, len(table))).to_pylist()
            return rows

    def to_arrow(self) -> Any:
        """Return all rows as a ``pyarrow.Table``."""
        return concatenated(list(self.batches()))

    def to_pandas(self) -> Any:
        """Return all rows as a data frame."""
        return self.to_arrow().to_pandas()

    def save(self, path: str | Path, format: TableFormat | None = None) -> Path:
        """Write all rows as Parquet, CSV or JSON lines, in bounded memory.

        Raises:
            InputError: for a format nobody knows.
            RunError: if the file cannot be written.
        """
        target = Path(path)
        kind = table_format(target, format)
        export_table(self._directory, target, kind, self._columns, self._rows_of)
        return target

    def __repr__(self) -> str:
        """Return size and columns."""
        return f"RunTable({len(self):,} rows: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        rows = [[_short(r[c]) for c in self.columns] for r in self.head()]
        more = f"<p>{len(self):,} rows</p>"
        return html_table(self.columns, rows) + more


def _short(value: object, width: int = 80) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= width else text[: width - 1] + "…"
