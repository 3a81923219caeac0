"""Requests of a table, one per line or row, checked with their place in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from samullm_plugin.app import rowtables
from samullm_plugin.app.fields import validate
from samullm_plugin.app.spec import RequestsSection, SamplingSection
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.application import ModelSpec

CHARACTERS_PER_TOKEN = 4

TokenCounter = Callable[[ModelSpec, str], int | None]
"""Counts the tokens of a text for a model; None if it has no tokenizer for it."""


def estimate_tokens(text: str) -> int:
    """Return a rough number of tokens: one per four characters, rounded up."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


Id = Annotated[str, BeforeValidator(lambda v: str(v) if type(v) is int else v)]


class RequestLine(BaseModel):
    """One line of a requests file; fields of other names are kept for templates and joins."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: Id | None = Field(default=None, min_length=1)
    prompt: str | None = None
    messages: list[Mapping[str, JsonValue]] | None = None
    prompt_tokens: int | None = Field(default=None, ge=1)
    prompt_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    sampling_params: SamplingSection = SamplingSection()
    inputs: list[str] = []
    prefix_id: Id | None = None
    prefix_tokens: int = Field(default=0, ge=0)
    chunks: list[str | Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)


@dataclass(frozen=True, slots=True)
class Line:
    """A checked line.

    Attributes:
        where: file and line number, for messages.
        id: unique in the file.
        item: the line it comes from; differs from ``id`` for a chunk of a line.
        values: its known fields.
        fields: every field as written, for templates, joins and ``where``.
    """

    where: str
    id: str
    item: str
    values: RequestLine
    fields: Mapping[str, Any]


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
    first_of: dict[str, str] = {}
    unknown: dict[str, str] = {}
    most = min((n for n in (limit, table.limit) if n is not None), default=None)
    taken, table_path = 0, base / table.name
    for number, (place, row) in enumerate(_rows(table, base, where, given), start=1):
        fields = _prepared(row, table, place, where)
        if fields is None:
            continue
        taken += 1
        for line in _chunks(checked(fields, number, place)):
            if line.id in first_of:
                raise InputError(
                    f"{place}: the id {line.id!r} is already that of "
                    f"{first_of[line.id].removeprefix(f'{table_path} ')}; ids "
                    "must be unique in a file"
                )
            first_of[line.id] = place
            lines.append(line)
            for name in line.values.model_extra or ():
                if (close := suggest(name, RequestLine.model_fields)) and name not in unknown:
                    unknown[name] = f"{place}: the field {name!r} is kept for templates only{close}"
        if taken == most:
            break
    if not lines:
        left = f" with {dict(table.where)}" if table.where else ""
        raise InputError(f"{base / table.name}: it holds no requests{left}")
    notes.extend(unknown.values())
    return tuple(lines)


def _rows(
    table: RequestsSection, base: Path, where: str, given: object | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, fields) of every row of a table."""
    if given is not None:
        yield from rowtables.batch_rows(rowtables.memory_batches(given, table.name))
    elif table.dataset is not None:
        found = rowtables.dataset_batches(table.dataset, table.split, base, where)
        yield from rowtables.batch_rows(found)
    else:
        for path, kind in rowtables.shards(base / table.name, table.format, where):
            if kind == "jsonl":
                yield from _json_lines(path)
            else:
                ids = [name for name in (table.id or "id",) if name]
                yield from rowtables.batch_rows(rowtables.file_batches(path, kind, ids))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, fields) of every line that is not empty."""
    try:
        with rowtables.opened(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    for number, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(row)
        except ValueError as error:
            raise InputError(
                f"{where}: is not JSON: {error}; each line must be one JSON object"
            ) from error
        if not isinstance(value, dict):
            raise InputError(f"{where}: must be a JSON object, not {type(value).__name__}")
        yield where, value


def _prepared(
    row: dict[str, Any], table: RequestsSection, place: str, where: str
) -> dict[str, Any] | None:
    """Return a row under its new names; None if ``where`` leaves it out."""
    for name in (*table.rename, *([table.id] if table.id else ())):
        if name not in row:
            known = f"; columns: {', '.join(row)}"
            hint = suggest(name, row) or known
            field = "rename" if name in table.rename else "id"
            raise InputError(f"{where}.{field}: {place} has no column {name!r}{hint}")
    fields = {table.rename.get(n, n): v for n, v in row.items()}
    if len(fields) < len(row):
        new = next(n for n in table.rename.values() if n in row and n not in table.rename)
        raise InputError(f"{where}.rename: {place} has a column {new!r} already; rename it as well")
    if table.id is not None:
        fields["id"] = row[table.id]
    for name, value in table.where.items():
        if name not in fields:
            raise InputError(f"{where}.where: {place} has no field {name!r}{suggest(name, fields)}")
        if fields[name] not in (value if isinstance(value, list) else [value]):
            return None
    # A column that a row leaves empty is as good as not there, where the field is known.
    return {n: v for n, v in fields.items() if v is not None or n not in RequestLine.model_fields}


def checked(fields: dict[str, Any], number: int, where: str) -> Line:
    """Return a row as a request.

    Args:
        fields: of the row; not kept.
        number: of the row in its table, from 1.
        where: file and line, for messages.

    Raises:
        InputError: naming the field that is wrong.
    """
    if isinstance(fields.get("body"), dict):
        body = fields.pop("body")
        known = {"max_tokens": body.get("max_completion_tokens"), **body}
        sampling = {n: v for n, v in known.items() if n in SamplingSection.model_fields}
        fields = {"sampling_params": sampling, **fields, **body}
    if "custom_id" in fields:
        fields.setdefault("id", fields.pop("custom_id"))
    values = validate(RequestLine, fields, where)
    origins = [
        name
        for name in ("prompt", "messages", "prompt_token_ids", "chunks")
        if getattr(values, name) is not None
    ]
    if len(origins) > 1:
        raise InputError(f"{where}: give {' or '.join(origins)}, not both")
    own = f"line-{number}" if values.id is None else values.id
    return Line(where, own, own, values, fields)


def _chunks(line: Line) -> Iterable[Line]:
    """Return the line itself, or one line per chunk of its document."""
    chunks = line.values.chunks
    if chunks is None:
        return (line,)
    found = []
    for k, chunk in enumerate(chunks):
        own = {"prompt": chunk} if isinstance(chunk, str) else {"prompt_tokens": chunk}
        values = line.values.model_copy(update={"chunks": None, "prompt_tokens": None, **own})
        fields = {n: v for n, v in line.fields.items() if n not in ("chunks", "prompt_tokens")}
        fields |= {**own, "chunk": k, "num_chunks": len(chunks)}
        found.append(Line(f"{line.where}, chunk {k}", f"{line.id}/{k}", line.id, values, fields))
    return found
