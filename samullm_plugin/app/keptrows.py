"""Rows of a table as they were read, kept compact: their fields are made when they are asked for.

A row as a mapping of Python objects takes several times the bytes that it has in its file. What is
kept of it is its line of JSON, or its place in a record batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from samullm_plugin.app import rowtables
from samullm_plugin.files import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

Fields = Mapping[str, Any]

PLACES = tuple(range(rowtables.CHUNK_ROWS))
"""The places in a block: one object for each of them, whatever the number of blocks."""


class Block(ABC):
    """Some rows of one file, in order, :data:`PLACES` at most.

    Attributes:
        named: makes of a row as it was read the fields of a request.
    """

    unit = "row"

    def __init__(
        self, name: str, numbers: Sequence[int], named: Callable[[Fields], Fields]
    ) -> None:
        """Take note of where the rows are.

        Args:
            name: of the file.
            numbers: of the rows in it, from 1.
            named: see above.
        """
        self.named = named
        self._name, self._numbers = name, numbers

    def where(self, at: int) -> str:
        """Return file and number of a row, for messages."""
        return f"{self._name} {self.unit} {self._numbers[at]}"

    @cached_property
    def names(self) -> AbstractSet[str]:
        """Return the names of all fields that some row has."""
        found: set[str] = set()
        for row in self.rows():
            with suppress(ValueError):  # it is no request
                found.update(self.named(row))
        return found

    def keep(self, places: Sequence[int]) -> None:
        """Forget all rows but some; their places are those in this list from then on."""
        numbers = self._numbers
        self._numbers = array("q", [numbers[at] for at in places])
        self._keep(places)

    @abstractmethod
    def rows(self) -> Iterator[Fields]:
        """Yield all rows as they were read."""

    @abstractmethod
    def row(self, at: int) -> Fields:
        """Return one row as it was read."""

    @abstractmethod
    def _keep(self, places: Sequence[int]) -> None:
        """Forget all rows but some."""


class LineBlock(Block):
    """Lines of JSON."""

    unit = "line"

    def __init__(
        self,
        name: str,
        numbers: Sequence[int],
        named: Callable[[Fields], Fields],
        lines: Sequence[bytes],
        more: Fields | None = None,
    ) -> None:
        """Keep lines, each of which is an object.

        Args:
            name: of the file.
            numbers: of the lines in it, from 1.
            named: makes of a row as it was read the fields of a request.
            lines: the rows.
            more: fields that all of them have besides, if they are not their own.
        """
        super().__init__(name, numbers, named)
        self._lines, self._more = lines, more

    def rows(self) -> Iterator[Fields]:
        """Yield all rows as they were read."""
        return (self._whole(parse_json(line)) for line in self._lines)

    def row(self, at: int) -> Fields:
        """Return one row as it was read."""
        return self._whole(parse_json(self._lines[at]))

    def _whole(self, own: Fields) -> Fields:
        return {**self._more, **own} if self._more else own

    def _keep(self, places: Sequence[int]) -> None:
        self._lines = [self._lines[at] for at in places]


class RowBlock(LineBlock):
    """Rows of a table that is no JSON lines, kept as such: each is of a shape of its own."""

    unit = "row"


class TableBlock(Block):
    """Rows of a record batch that nobody changes."""

    def __init__(
        self,
        name: str,
        numbers: Sequence[int],
        named: Callable[[Fields], Fields],
        batch: pa.RecordBatch,
    ) -> None:
        """Keep the rows of a batch."""
        super().__init__(name, numbers, named)
        self._batch = batch
        self._columns: list[rowtables.Column] | None = None

    def columns(self) -> Mapping[str, pa.Array]:
        """Return the columns by name; of two of one name, the last, as in rows."""
        return dict(zip(self._batch.schema.names, self._batch.columns, strict=True))

    def renamed(self, columns: Mapping[str, pa.Array]) -> TableBlock:
        """Return the same rows with columns that have the names of fields."""
        import pyarrow as pa

        batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
        return TableBlock(self._name, self._numbers, as_it_is, batch)

    def rows(self) -> Iterator[Fields]:
        """Yield all rows as they were read.

        Raises:
            InputError: for a value that JSON cannot hold.
        """
        return rowtables.batch_rows(self._batch, self.where)

    def row(self, at: int) -> Fields:
        """Return one row as it was read."""
        if self._columns is None:
            self._columns = rowtables.checked_columns(self._batch)
        return rowtables.checked_row(self._columns, at)

    def _keep(self, places: Sequence[int]) -> None:
        import pyarrow as pa

        wanted = pa.array(places, pa.int32())
        columns = [_taken(column, wanted) for column in self._batch.columns]
        self._batch = pa.RecordBatch.from_arrays(columns, schema=self._batch.schema)
        self._columns = None


def _taken(column: pa.Array, places: pa.Array) -> pa.Array:
    """Return some values of a column; Arrow itself takes none of views and run-length encodings."""
    import pyarrow as pa

    try:
        return column.take(places)
    except pa.ArrowNotImplementedError:
        values = [column[at].as_py() for at in places.to_pylist()]
        return pa.array(values, column.type)


def as_it_is(row: Fields) -> Fields:
    """Return the fields of a row that has the names of a request's fields already."""
    return row


class KeptRow:
    """A row and where it is.

    Attributes:
        block: that holds it.
        at: its place there.
    """

    __slots__ = ("at", "block")

    def __init__(self, block: Block, at: int) -> None:
        self.block, self.at = block, at


Row = KeptRow | Fields
"""The fields of a row, or where they are."""


def fields_of(row: Row) -> Fields:
    """Return the fields of a row."""
    return row.block.named(row.block.row(row.at)) if isinstance(row, KeptRow) else row


def has_field(row: Row, name: str) -> bool:
    """Return whether a row has a field; where no row of its block has it, none is read."""
    if isinstance(row, KeptRow):
        return name in row.block.names and name in fields_of(row)
    return name in row


def each_fields(rows: Iterable[Row]) -> Iterator[Fields]:
    """Yield the fields of rows, most of which follow one another: a block is read as a whole."""
    block: Block | None = None
    read: Sequence[Fields] = ()
    for row in rows:
        if not isinstance(row, KeptRow):
            yield row
            continue
        if row.block is not block:
            block, read = row.block, list(row.block.rows())
        yield block.named(read[row.at])


class RowFields(Sequence[Fields]):
    """The fields of a node's requests."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """Take note of where they are."""
        self._own: dict[int, Fields] = {}
        self._blocks: list[Block] = []
        self._block, self._at = array("i"), array("i")
        for k, row in enumerate(rows):
            if isinstance(row, KeptRow):
                if not self._blocks or self._blocks[-1] is not row.block:
                    self._blocks.append(row.block)
                self._block.append(len(self._blocks) - 1)
                self._at.append(row.at)
            else:
                self._own[k] = row
                self._block.append(-1)
                self._at.append(0)

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self._at)

    def __getitem__(self, k: Any) -> Any:
        """Return the fields of one request, or those of some as a tuple."""
        if isinstance(k, slice):
            return tuple(self[j] for j in range(*k.indices(len(self))))
        return fields_of(self._row(k if k >= 0 else k + len(self)))

    def __iter__(self) -> Iterator[Fields]:
        """Yield the fields of all requests."""
        return each_fields(map(self._row, range(len(self))))

    def _row(self, k: int) -> Row:
        block = self._block[k]
        return self._own[k] if block < 0 else KeptRow(self._blocks[block], self._at[k])
