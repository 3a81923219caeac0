"""Tables that Python code hands over: of pandas, polars, pyarrow, ``datasets``, lists of mappings.

What has columns of one type each is read as Arrow's record batches. Lists of mappings, and data
frames with a column of several types, are rows of their own: read as lines of JSON would be, so
that a field may be missing in some rows, or be a number here and a text there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set, ValuesView
from typing import TYPE_CHECKING, Any

import pydantic
import pydantic_core

from samullm_plugin.app.rowtables import CHUNK_ROWS, json_value, stored_batches
from samullm_plugin.errors import InputError
from samullm_plugin.files import Row

if TYPE_CHECKING:
    from samullm_plugin.app.rowtables import Batches


def label_of(file: str) -> str:
    """Return what messages call a table that stands for a file nobody has written."""
    return f"data of node {file.rpartition('.')[0]},"


def lasting(table: Any) -> object:
    """Return a table that can be read several times: generators and readers are read to their end.

    Records of numpy, and rows that are in no order, become lists of rows as well.
    """
    package = _package(table)
    if package == "pyarrow" and hasattr(table, "read_all"):
        return table.read_all()
    if package == "numpy" and getattr(getattr(table, "dtype", None), "names", None):
        return [dict(zip(table.dtype.names, row, strict=True)) for row in table.tolist()]
    return list(table) if isinstance(table, Iterator | Set | ValuesView) else table


def is_rows(table: object) -> bool:
    """Return whether a table is rows of their own rather than columns of one type each."""
    if isinstance(table, Sequence) and not isinstance(table, str | bytes):
        return True
    return any(not _has_one_type(column) for column in _loose_columns(table))


def _loose_columns(table: Any) -> Iterator[Any]:
    """Yield the columns of which only their values tell a type."""
    if _package(table) == "pandas" and hasattr(table, "columns"):
        yield from (table.iloc[:, i] for i, kind in enumerate(table.dtypes) if kind.kind == "O")
    elif isinstance(table, Mapping) and _package(table) != "datasets":
        yield from table.values()


def _has_one_type(column: Any) -> bool:
    import pyarrow as pa

    try:
        pa.array(column, from_pandas=True)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        return False
    return True


def memory_rows(table: Any, name: str) -> Iterator[Row]:
    """Yield the rows of a table of which :func:`is_rows` holds; what is wrong with one is its own.

    Args:
        table: a sequence of mappings, a mapping of columns, or a data frame of pandas.
        name: what to call it in messages.

    Raises:
        InputError: if it is no table.
    """
    if _package(table) == "pandas":
        table = _without_gaps(table, name).to_dict("records")
    elif isinstance(table, Mapping):
        try:
            cells = zip(*table.values(), strict=True)
            table = [dict(zip(table, row, strict=True)) for row in cells]
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} its columns are of several lengths, or are none") from error
    for number, row in enumerate(table, start=1):
        fields = _fields_of(row)
        if fields is None:
            raise InputError(
                f"{name} row {number}: is a {type(row).__name__}; a row is a mapping of fields, "
                'such as {"prompt": "..."}'
            )
        yield _as_line(number, fields)


def _fields_of(row: Any) -> Mapping[Any, Any] | None:
    """Return the fields of a mapping, a pydantic model, a dataclass or a named tuple; else None."""
    if isinstance(row, Mapping):
        return row
    if isinstance(row, pydantic.BaseModel):
        return row.model_dump()
    if dataclasses.is_dataclass(row) and not isinstance(row, type):
        return dataclasses.asdict(row)
    if isinstance(row, tuple) and hasattr(row, "_asdict"):
        fields: Mapping[Any, Any] = row._asdict()
        return fields
    return None


def _as_line(number: int, row: Mapping[Any, Any]) -> Row:
    value: dict[str, Any] = {}
    for field, cell in row.items():
        try:
            value[str(field)] = json_value(cell)
        except TypeError as wrong:
            reason = f"the field {str(field)!r} holds {wrong}, which no prompt can take"
            return Row(number, {}, reason)
    try:
        return Row(number, value, None, pydantic_core.to_json(value, inf_nan_mode="constants"))
    except ValueError as error:
        reason = "holds half of a UTF-16 pair" if "surrogate" in str(error) else str(error)
        return Row(number, {}, f"cannot be written as JSON: {reason}")


def _without_gaps(table: Any, name: str) -> Any:
    """Return a data frame with None for what is missing, and its index as columns if it has names.

    Raises:
        InputError: for two columns of one name.
    """
    named = [n for n in table.index.names if n is not None]
    table = table.reset_index(level=named).reset_index(drop=True) if named else table
    if twice := sorted({str(c) for c in table.columns[table.columns.duplicated()]}):
        raise InputError(f"{name} the column {twice[0]!r} is there twice; rename one")
    return table.astype(object).where(table.notna(), None)


def memory_batches(table: object, name: str) -> Batches:
    """Yield the batches of a table in memory.

    Args:
        table: of pandas, polars, pyarrow or ``datasets``; a mapping of columns; anything that
            speaks Arrow's C stream interface.
        name: what to call it in messages.

    Raises:
        InputError: if it is no table.
    """
    import pyarrow as pa

    package = _package(table)
    value: Any = table
    try:
        if package == "datasets" and isinstance(value, Mapping):
            raise TypeError(f"it has several splits, {', '.join(value)}: give one of them")
        if package == "datasets":
            yield from stored_batches(value, name)
            return
        if package == "polars" and hasattr(value, "collect"):
            value = value.collect()
        if package == "pandas" and hasattr(value, "columns"):
            value = _frame(value)
        elif isinstance(value, Mapping):
            value = pa.table({str(n): pa.array(v, from_pandas=True) for n, v in value.items()})
        elif type(value).__name__ == "Series":
            raise TypeError("it is one column: give its to_frame()")
        elif package == "pyarrow" and hasattr(value, "to_batches"):  # a table, or a dataset's
            pass
        elif not hasattr(value, "__arrow_c_stream__"):
            raise TypeError("it has no rows and columns")
        else:
            value = pa.RecordBatchReader.from_stream(value)
    except (pa.ArrowException, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{name} a {type(table).__name__} cannot be read as a table ({error}); give a table "
            "of pandas, polars, pyarrow or datasets, or a list of mappings"
        ) from error
    if isinstance(value, pa.Table):
        value = value.to_batches(max_chunksize=CHUNK_ROWS)
    elif hasattr(value, "to_batches"):
        value = value.to_batches()
    for batch in value:
        yield name, batch


def _frame(table: Any) -> Any:
    """Return a data frame of pandas as an Arrow table; an index that has a name is a column."""
    import pyarrow as pa

    periods = [c for c, kind in table.dtypes.items() if str(kind).startswith("period")]
    table = table.astype(dict.fromkeys(periods, "string")) if periods else table  # else numbers
    named = any(n is not None for n in table.index.names)
    return pa.Table.from_pandas(table, preserve_index=named)


def own_batches(batches: Batches) -> Batches:
    """Yield copies of batches that only the reader holds: of a table that others may change."""
    import pyarrow as pa

    for name, batch in batches:
        copy = pa.BufferOutputStream()
        with pa.ipc.new_stream(copy, batch.schema) as stream:  # with its dictionaries, if any
            stream.write_batch(batch)
        yield name, pa.ipc.open_stream(copy.getvalue()).read_next_batch()


def _package(table: object) -> str:
    return type(table).__module__.partition(".")[0]
