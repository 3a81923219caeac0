"""Requests of a table, one per line or row, checked with their place in it."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from samullm_plugin.app import memorytables, rowtables
from samullm_plugin.app.csvtables import BadRow
from samullm_plugin.app.keptrows import (
    PLACES,
    Block,
    Fields,
    KeptRow,
    LineBlock,
    Row,
    RowBlock,
    TableBlock,
    as_it_is,
    fields_of,
)
from samullm_plugin.app.requestlines import (
    PLAIN,
    UNUSUAL,
    LineValues,
    RequestLine,
    RowError,
    checked,
    requested,
)
from samullm_plugin.app.rowspec import RequestsSection
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.files import Row as FileRow
from samullm_plugin.files import read_rows


class Line(KeptRow):
    """One request of a table.

    Attributes:
        id: unique in the file.
        item: the line it comes from; differs from ``id`` for a chunk of a line.
        values: its known fields.
        error: why it cannot be asked; None if it can.
        own: fields in place of those of its row, such as a chunk's.
        chunk: its number, if it is a chunk of its row.
    """

    __slots__ = ("chunk", "error", "id", "item", "own", "values")

    def __init__(
        self,
        block: Block,
        at: int,
        id: str,
        item: str,
        values: LineValues,
        error: str | None = None,
        own: Fields | None = None,
        chunk: int | None = None,
    ) -> None:
        self.block, self.at, self.id, self.item, self.values = block, at, id, item, values
        self.error, self.own, self.chunk = error, own, chunk

    @property
    def row(self) -> Row:
        """Return its fields, or where they are."""
        return self if self.own is None else self.own

    @property
    def fields(self) -> Fields:
        """Return every field as written, for templates, joins and ``where``."""
        return fields_of(self.row)

    @property
    def where(self) -> str:
        """Return file and line number, for messages."""
        where = self.block.where(self.at)
        return where if self.chunk is None else f"{where}, chunk {self.chunk}"


def read_requests(
    table: RequestsSection,
    base: Path,
    where: str,
    notes: list[str],
    *,
    given: object | None = None,
    limit: int | None = None,
) -> tuple[Line, ...]:
    """Return the requests of a table; a row with ``chunks`` becomes one request per chunk.

    Lines of the OpenAI batch format (``custom_id`` and ``body``) are understood as well.

    Args:
        table: what to read.
        base: folder that files are relative to.
        where: file and field of the table, for messages.
        notes: remarks for the user are added here.
        given: a table in memory to read instead of the file.
        limit: take no more rows than this.

    Raises:
        InputError: naming file, line and field.
    """
    lines: list[Line] = []
    named = str(base / table.name) if given is None else memorytables.label_of(table.name)
    ids = _Ids(lines, f"{named} ")
    seen: set[str] = set()
    names = _Names(table)
    most = min((n for n in (limit, table.limit) if n is not None), default=None)
    done = taken = 0
    for block, read, wrong in _blocks(table, base, where, given, names):
        plain = names.plain(block) if most is None and isinstance(block, TableBlock) else None
        if plain is not None:
            own = plain.columns()["id"].to_pylist()
            if all(own) and ids.add_all(own):
                notes += _misspelt(plain.where(0), plain.columns(), seen)
                lines += [Line(plain, at, n, n, PLAIN) for at, n in zip(PLACES, own, strict=False)]
                done += len(own)
                continue
        rows = list(block.rows()) if read is None else read
        numbers: Sequence[int] = range(done + 1, done + len(rows) + 1)
        done += len(rows)
        own = names.plain_ids(rows, numbers) if most is None and wrong is None else None
        if own is not None and ids.add_all(own):
            for at, row in enumerate(rows):
                if not seen.issuperset(row):
                    notes += _misspelt(block.where(at), row, seen)
            block.named = as_it_is
            lines += [Line(block, at, n, n, PLAIN) for at, n in zip(PLACES, own, strict=False)]
            continue
        if table.where and wrong is None:
            places = [at for at, row in enumerate(rows) if names.wanted(row)]
            if len(places) < len(rows):
                rows = [rows[at] for at in places]
                numbers = [numbers[at] for at in places]
                block.keep(places)
        for at, number, row in zip(PLACES, numbers, rows, strict=False):
            taken += 1
            try:
                if wrong is not None:
                    raise RowError(wrong)
                name, values, fields = checked(names.renamed(row), number)
            except RowError as error:
                fields = {n: v for n, v in row.items() if n != "messages"}  # which may be anything
                name = f"line-{number}"
                found = [Line(block, at, name, name, PLAIN, str(error), fields)]
            else:
                found = [Line(block, at, name, name, values)]
                if values.chunks is not None:
                    found = list(_chunks(found[0], fields, values.chunks))
            for line in found:
                ids.check(line, number)
                lines.append(line)
            if not seen.issuperset(fields):
                notes += _misspelt(block.where(at), fields, seen)
            if taken == most:
                block.keep(PLACES[: at + 1])
                return tuple(lines)
    if not lines:
        left = f" with {dict(table.where)}" if table.where else ""
        raise InputError(f"{named.removesuffix(',')}: it holds no requests{left}")
    return tuple(lines)


class _Ids:
    """The ids of a table's lines; where each is, is found once it is there twice."""

    def __init__(self, lines: Sequence[Line], file: str) -> None:
        self._lines, self._file = lines, file
        self._known: set[str] = set()
        self._where: dict[str, str] = {}

    def check(self, line: Line, number: int) -> None:
        """Make a line whose id is already there one that cannot be asked.

        Args:
            line: a line.
            number: of its row.
        """
        if line.id not in self._known:
            self._known.add(line.id)
            if self._where:
                self._where[line.id] = line.block.where(line.at)
            return
        if not self._where:
            self._where = {other.id: other.block.where(other.at) for other in self._lines}
        twice = self._where[line.id].removeprefix(self._file)
        reason = f"the id {line.id!r} is already that of {twice}; ids must be unique"
        line.error = line.error or reason
        line.id = line.item = f"line-{number}"
        line.values, line.chunk = PLAIN, None

    def add_all(self, ids: Sequence[str]) -> bool:
        """Return whether all of these are new; then, and only then, they are known."""
        new = set(ids)
        if self._where or len(new) < len(ids) or not new.isdisjoint(self._known):
            return False
        self._known |= new
        return True


def _misspelt(where: str, fields: Collection[str], seen: set[str]) -> Iterator[str]:
    """Yield remarks about fields that are close to known ones, each name once."""
    absent = RequestLine.model_fields.keys() - set(fields)
    for name in set(fields) - seen:
        seen.add(name)
        if name not in RequestLine.model_fields and (close := suggest(name, absent)):
            yield f"{where}: the field {name!r} is kept for templates only{close}"


_Read = tuple[Block, Sequence[Fields] | None, str | None]
"""Some rows; as they were read, if they are at hand; what is wrong, if it is one that is none."""


def _blocks(
    table: RequestsSection, base: Path, where: str, given: object | None, names: _Names
) -> Iterator[_Read]:
    """Yield the rows of a table, some at a time."""
    if given is not None and memorytables.is_rows(given):
        label = memorytables.label_of(table.name)
        yield from _line_blocks(label, memorytables.memory_rows(given, label), names, RowBlock)
    elif given is not None:
        batches = memorytables.memory_batches(given, memorytables.label_of(table.name))
        yield from _table_blocks(memorytables.own_batches(batches), names)
    elif table.dataset is not None:
        batches = rowtables.dataset_batches(table.dataset, table.config, table.split, base, where)
        yield from _table_blocks(batches, names)
    else:
        folder = base / table.name
        for path, kind in rowtables.shards(folder, table.format, where):
            parts = {} if path == folder else rowtables.partition_of(path, folder)
            if kind == "jsonl":
                rows = read_rows(path, "requests")
                yield from _line_blocks(str(path), rows, names, more=parts)
            else:
                ids = [name for name in (table.id or "id",) if name]
                pieces = rowtables.with_fields(rowtables.file_batches(path, kind, ids), parts)
                yield from _table_blocks(pieces, names)


def _table_blocks(batches: rowtables.Pieces, names: _Names) -> Iterator[_Read]:
    for name, numbers, batch in rowtables.numbered_batches(batches):
        if isinstance(batch, BadRow):
            yield RowBlock(name, numbers, names.fields, (b"{}",)), ({},), batch.reason
            continue
        yield TableBlock(name, numbers, names.fields, batch), None, None


def _line_blocks(
    name: str,
    given: Iterable[FileRow],
    names: _Names,
    kind: type[LineBlock] = LineBlock,
    more: Fields | None = None,
) -> Iterator[_Read]:
    numbers, lines, rows, size = array("q"), list[bytes](), list[Fields](), 0
    for row in given:
        full = len(rows) == rowtables.CHUNK_ROWS or size > rowtables.CHUNK_BYTES
        if rows and (full or row.error is not None):
            yield kind(name, numbers, names.fields, lines, more), rows, None
            numbers, lines, rows, size = array("q"), [], [], 0
        if row.error is not None:
            yield kind(name, (row.number,), names.fields, (b"{}",)), ({},), row.error
            continue
        numbers.append(row.number)
        lines.append(row.line)
        rows.append({**more, **row.value} if more else row.value)
        size += len(row.line)
    if rows:
        yield kind(name, numbers, names.fields, lines, more), rows, None


class _Names:
    """What the columns of a table are called in requests.

    Args:
        table: what to read.
    """

    def __init__(self, table: RequestsSection) -> None:
        self._id, self._rename, self._where = table.id, dict(table.rename), dict(table.where)
        self._named = (*self._rename, *([table.id] if table.id else ()))

    def fields(self, row: Fields) -> Fields:
        """Return the fields of a request."""
        return requested(self.renamed(row) if self._named else row)

    def renamed(self, row: Fields) -> Fields:
        """Return a row under its new names.

        Raises:
            RowError: if it lacks a column that the table's section names.
        """
        fields = self._renamed(row) if self._named else row
        for name in self._where:
            if name not in fields:
                raise RowError(f"requests.where: it has no field {name!r}{suggest(name, fields)}")
        return fields

    def wanted(self, row: Fields) -> bool:
        """Return whether ``where`` takes a row; wrong ones are reported later."""
        try:
            fields = self._renamed(row)
        except RowError:
            return True
        for name, value in self._where.items():
            if name not in fields:
                return True
            if fields[name] not in (value if isinstance(value, list) else [value]):
                return False
        return True

    def plain(self, block: TableBlock) -> TableBlock | None:
        """Return rows under their new names if all are ids, texts and fields of their own.

        None: each of them has to be looked at.
        """
        columns = block.columns()
        if self._where or not all(n in columns for n in self._named):
            return None
        new = [self._rename.get(n, n) for n in columns]
        found = dict(zip(new, columns.values(), strict=True))
        if self._id is not None:
            found["id"] = columns[self._id]
        if len(set(new)) < len(new) or "id" not in found or not UNUSUAL.isdisjoint(found):
            return None
        if not all(rowtables.is_plain(column.type) for column in found.values()):
            return None
        known = [found[n] for n in ("id", "prompt") if n in found]
        if not all(rowtables.is_text(c.type) and c.null_count == 0 for c in known):
            return None
        return block.renamed(found)

    def plain_ids(self, rows: Sequence[Fields], numbers: Sequence[int]) -> list[str] | None:
        """Return the ids of rows under their own names if all are as :meth:`plain` says."""
        if self._named or self._where or not UNUSUAL.isdisjoint(set[str]().union(*rows)):
            return None
        if not all(type(row.get("prompt", "")) is str for row in rows):
            return None
        own = [row.get("id", f"line-{number}") for row, number in zip(rows, numbers, strict=True)]
        return own if all(type(name) is str and name for name in own) else None

    def _renamed(self, row: Fields) -> Fields:
        fields = row
        for name in self._named:
            if name not in row:
                hint = suggest(name, row) or f"; columns: {', '.join(row)}"
                part = "rename" if name in self._rename else "id"
                raise RowError(f"requests.{part}: it has no column {name!r}{hint}")
        if self._rename:
            fields = {self._rename.get(n, n): v for n, v in row.items()}
            if len(fields) < len(row):
                new = next(n for n in self._rename.values() if n in row and n not in self._rename)
                raise RowError(
                    f"requests.rename: it has a column {new!r} already; rename it as well"
                )
        if self._id is not None and (self._id != "id" or self._rename):
            fields = {**fields, "id": row[self._id]}
        return fields


def _chunks(line: Line, fields: Fields, chunks: Sequence[str | int]) -> Iterator[Line]:
    """Yield one line per chunk of a line's document."""
    rest = {n: v for n, v in fields.items() if n not in ("chunks", "prompt_tokens")}
    for k, chunk in enumerate(chunks):
        own = {"prompt": chunk} if isinstance(chunk, str) else {"prompt_tokens": chunk}
        tokens = None if isinstance(chunk, str) else int(chunk)
        values = replace(line.values, chunks=None, prompt_tokens=tokens)
        yield Line(
            line.block,
            line.at,
            f"{line.id}/{k}",
            line.id,
            values,
            own={**rest, **own, "chunk": k, "num_chunks": len(chunks)},
            chunk=k,
        )
