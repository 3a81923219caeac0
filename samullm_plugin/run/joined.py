"""The joined table of a run: one row per item, with its inputs and what every node made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic_core import PydanticSerializationError, to_json

from samullm_plugin.run.columns import FIGURES, find_columns
from samullm_plugin.run.rows import NodeRows, RunRows

if TYPE_CHECKING:
    import pyarrow as pa


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
        outputs = {n.name: n.fields for n in rows.nodes}
        self.columns = find_columns(columns, outputs, rows.fields, rows_of)
        self._row_node = -1 if rows_of is None else names.index(rows_of)
        # Calls that make lists are no rows; their elements are.
        self._calls = 0 if rows_of is None else rows.nodes[self._row_node].calls
        self._groups = [rows.by_item(i) for i in range(len(rows.nodes))]
        self._several = [
            bool(len(starts) > 1 and np.diff(starts).max(initial=0) > 1)
            for _, starts in self._groups
        ]

    def __len__(self) -> int:
        """Return the number of rows."""
        node = self._row_node
        return self.rows.num_items if node < 0 else len(self.rows.nodes[node]) - self._calls

    # Rows

    def unsettled(self) -> Any:
        """Return how many requests each row still waits for, shape ``(len(self),)``."""
        counts = np.zeros(self.rows.num_items, np.int64)
        for i, node in enumerate(self.rows.nodes):
            left = node.item[~self.rows.settled(i)]
            counts += np.bincount(left, minlength=self.rows.num_items)
        if self._row_node < 0:
            return counts
        return counts[self.rows.nodes[self._row_node].item[self._calls :]]

    def part(self, first: int, last: int) -> pa.Table:
        """Return some rows; cells of requests that are not settled or not taken are null."""
        cells: dict[str, list[Any]] = {c.name: [] for c in self.columns}
        for row in self._rows(first, last):
            for column, value in zip(self.columns, row, strict=True):
                cells[column.name].append(value)
        import pyarrow as pa

        return pa.table({name: column_of(values) for name, values in cells.items()})

    def _rows(self, first: int, last: int) -> Iterator[list[Any]]:
        if self._row_node < 0:
            for item, (name, fields) in zip(
                range(first, last), self.rows.items(first), strict=False
            ):
                yield self._row(name, fields, lambda i, item=item: self.of_item(i, item), {})
            return
        node = self.rows.nodes[self._row_node]
        inputs = _Items(self.rows)
        for r in range(first + self._calls, last + self._calls):
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
            node = self.rows.nodes[i]
            values = [_value(node, record, column.path) for record in records[i]]
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


def _value(node: NodeRows, record: Mapping[str, Any] | None, path: tuple[str, ...]) -> Any:
    """Return what a column shows of one request."""
    if record is None or record["kind"] == "skipped":
        return None
    made = node.made(record)
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


def column_of(values: list[Any]) -> pa.Array:
    """Return values as a column; texts (JSON) where they are not of one type."""
    import pyarrow as pa

    try:
        found = pa.array(values)
        if not _has_empty_struct(found.type):
            return found
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    return pa.array([as_text(v) for v in values], pa.string())


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Return whether a type holds mappings of which none has a field: Parquet has no such type."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(_has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))


def as_text(value: Any) -> str | None:
    """Return a value as a text, JSON if it is none; halves of UTF-16 pairs as they are escaped."""
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    try:
        return to_json(value, inf_nan_mode="null", fallback=str).decode()
    except PydanticSerializationError:  # half of a pair inside
        return json.dumps(value, default=str)
