"""Requests of a table, one per line or row, checked with their place in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from samullm_plugin.app import rowtables
from samullm_plugin.app.bodies import (
    CHAT_OPTIONS,
    BodyError,
    check_chat,
    check_messages,
    from_batch,
)
from samullm_plugin.app.fields import describe
from samullm_plugin.app.rowspec import RequestsSection
from samullm_plugin.app.sampling import SamplingSection, TokenId
from samullm_plugin.app.section import LARGEST
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.files import read_rows
from samullm_plugin.model.application import ModelSpec

CHARACTERS_PER_TOKEN = 4

TokenCounter = Callable[[ModelSpec, str], int | None]
"""Counts the tokens of a text for a model; None if it has no tokenizer for it."""


def estimate_tokens(text: str) -> int:
    """Return a rough number of tokens: one per four characters, rounded up."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


Id = Annotated[str, BeforeValidator(lambda v: str(v) if type(v) is int else v)]
Tokens = Annotated[int, Field(ge=1, le=LARGEST)]


class RequestLine(BaseModel):
    """One line of a requests file; fields of other names are kept for templates and joins."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Id | None = Field(default=None, min_length=1)
    prompt: str | None = None
    messages: list[Mapping[str, JsonValue]] | None = None
    prompt_tokens: Tokens | None = None
    prompt_token_ids: list[TokenId] | None = Field(default=None, min_length=1)
    max_tokens: Tokens | None = None
    sampling_params: SamplingSection = SamplingSection()
    inputs: list[str] = []
    prefix_id: Id | None = None
    prefix_tokens: int = Field(default=0, ge=0, le=LARGEST)
    chunks: list[str | Tokens] | None = Field(default=None, min_length=1)


@dataclass(frozen=True, slots=True)
class LineValues:
    """What a line says beside its text; most lines share one of these.

    Attributes:
        prompt_tokens: length of its prompt, if stated.
        prompt_token_ids: its prompt as token ids.
        max_tokens: limit of its output.
        n: how many outputs it asks for; None: as many as its node.
        sampling: its own sampling parameters, by vLLM's names.
        chat: variables passed to the chat template of a conversation.
        inputs: outputs it waits for, as ``node:id``.
        prefix_id: requests of one id begin with the same tokens.
        prefix_tokens: how many.
        chunks: parts of its document, each a request.
    """

    prompt_tokens: int | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    max_tokens: int | None = None
    n: int | None = None
    sampling: Mapping[str, object] = field(default_factory=dict)
    chat: Mapping[str, object] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    prefix_id: str | None = None
    prefix_tokens: int = 0
    chunks: tuple[str | int, ...] | None = None


PLAIN = LineValues()
"""What lines say that only have a text."""

_SPECIAL = RequestLine.model_fields.keys() - {"id", "prompt", "messages"}


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a table.

    Attributes:
        where: file and line number, for messages.
        id: unique in the file.
        item: the line it comes from; differs from ``id`` for a chunk of a line.
        values: its known fields.
        fields: every field as written, for templates, joins and ``where``.
        error: why it cannot be asked; None if it can.
    """

    where: str
    id: str
    item: str
    values: LineValues
    fields: Mapping[str, Any]
    error: str | None = None


class RowError(ValueError):
    """A row that is no request; the message says why."""


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
    seen: set[str] = set()
    most = min((n for n in (limit, table.limit) if n is not None), default=None)
    taken = 0
    for number, (place, row, error) in enumerate(_rows(table, base, where, given), start=1):
        try:
            if error is not None:
                raise RowError(error)
            if (fields := _prepared(row, table)) is None:
                continue
            line = checked(fields, number, place)
        except RowError as wrong:
            rest = {n: v for n, v in row.items() if n != "messages"}  # which may be anything
            line = Line(place, f"line-{number}", f"line-{number}", PLAIN, rest, str(wrong))
        taken += 1
        for one in _chunks(line):
            if one.id in first_of:
                twice = first_of[one.id].removeprefix(f"{base / table.name} ")
                reason = f"the id {one.id!r} is already that of {twice}; ids must be unique"
                name = f"line-{number}"
                lines.append(Line(place, name, name, PLAIN, one.fields, one.error or reason))
                continue
            first_of[one.id] = place
            lines.append(one)
        notes += _misspelt(line, seen)
        if taken == most:
            break
    if not lines:
        left = f" with {dict(table.where)}" if table.where else ""
        raise InputError(f"{base / table.name}: it holds no requests{left}")
    return tuple(lines)


def _misspelt(line: Line, seen: set[str]) -> Iterator[str]:
    """Yield remarks about fields that are close to known ones, each name once."""
    for name in line.fields.keys() - seen:
        seen.add(name)
        if name not in RequestLine.model_fields and (
            close := suggest(name, RequestLine.model_fields)
        ):
            yield f"{line.where}: the field {name!r} is kept for templates only{close}"


def _rows(
    table: RequestsSection, base: Path, where: str, given: object | None
) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Yield place, fields and, if it is bad, what is wrong of every row of a table."""
    if given is not None:
        batches = rowtables.memory_batches(given, table.name)
        yield from ((w, f, None) for w, f in rowtables.batch_rows(batches))
    elif table.dataset is not None:
        batches = rowtables.dataset_batches(table.dataset, table.split, base, where)
        yield from ((w, f, None) for w, f in rowtables.batch_rows(batches))
    else:
        for path, kind in rowtables.shards(base / table.name, table.format, where):
            if kind == "jsonl":
                for row in read_rows(path, "requests"):
                    yield f"{path} line {row.number}", row.value, row.error
            else:
                ids = [name for name in (table.id or "id",) if name]
                batches = rowtables.file_batches(path, kind, ids)
                yield from ((w, f, None) for w, f in rowtables.batch_rows(batches))


def _prepared(row: Mapping[str, Any], table: RequestsSection) -> Mapping[str, Any] | None:
    """Return a row under its new names; None if ``where`` leaves it out.

    Raises:
        RowError: if it lacks a column that the table's section names.
    """
    for name in (*table.rename, *([table.id] if table.id else ())):
        if name not in row:
            hint = suggest(name, row) or f"; columns: {', '.join(row)}"
            part = "rename" if name in table.rename else "id"
            raise RowError(f"requests.{part}: it has no column {name!r}{hint}")
    fields = row
    if table.rename:
        fields = {table.rename.get(n, n): v for n, v in row.items()}
        if len(fields) < len(row):
            new = next(n for n in table.rename.values() if n in row and n not in table.rename)
            raise RowError(f"requests.rename: it has a column {new!r} already; rename it as well")
    if table.id is not None:
        fields = {**fields, "id": row[table.id]}
    for name, value in table.where.items():
        if name not in fields:
            raise RowError(f"requests.where: it has no field {name!r}{suggest(name, fields)}")
        if fields[name] not in (value if isinstance(value, list) else [value]):
            return None
    return fields


def checked(row: Mapping[str, Any], number: int, where: str) -> Line:
    """Return a row as a request.

    Args:
        row: its fields.
        number: of the row in its table, from 1.
        where: file and line, for messages.

    Raises:
        RowError: naming the field that is wrong.
    """
    fields = row
    if isinstance(row.get("body"), Mapping):
        try:
            fields = from_batch(row)
        except BodyError as error:
            raise RowError(str(error)) from error
    elif "custom_id" in row:
        fields = {n: v for n, v in row.items() if n != "custom_id"}
        fields.setdefault("id", row["custom_id"])
    # A column that a row leaves empty is as good as not there, where the field is known.
    empty = [n for n, v in fields.items() if v is None and n in RequestLine.model_fields]
    if empty:
        fields = {n: v for n, v in fields.items() if n not in empty}
    origins = [n for n in ("prompt", "messages", "prompt_token_ids", "chunks") if n in fields]
    if len(origins) > 1:
        raise RowError(f"give {' or '.join(origins)}, not both")
    own = fields.get("id")
    messages, chat = fields.get("messages"), _NONE
    if messages is not None:
        if not isinstance(messages, list):
            raise RowError("messages: must be a list")
        if (wrong := check_messages(messages)) is not None:
            raise RowError(wrong)
        chat = {n: fields[n] for n in CHAT_OPTIONS if fields.get(n) is not None}
        if (wrong := check_chat(chat)) is not None:
            raise RowError(wrong)
    plain = isinstance(own, str) and own and _SPECIAL.isdisjoint(fields)
    if plain and isinstance(fields.get("prompt", ""), str):
        values = PLAIN if not chat else LineValues(chat=chat)
    else:
        own, values = _special(fields, chat)
    own = f"line-{number}" if own is None else own
    return Line(where, own, own, values, fields)


_NONE: Mapping[str, object] = {}


def _special(
    fields: Mapping[str, Any], chat: Mapping[str, object]
) -> tuple[str | None, LineValues]:
    """Return id and values of a row with more than a text."""
    known = {n: fields[n] for n in RequestLine.model_fields if n in fields and n != "messages"}
    try:
        line = RequestLine.model_validate(known)
    except ValidationError as error:
        raise RowError(describe(error, RequestLine)) from error
    if _SPECIAL.isdisjoint(fields) and not chat:
        return line.id, PLAIN
    sampling = line.sampling_params.given()
    n = sampling.pop("n", None)
    limit = sampling.pop("max_tokens", None)
    return line.id, LineValues(
        line.prompt_tokens,
        None if line.prompt_token_ids is None else tuple(line.prompt_token_ids),
        line.max_tokens or cast("int | None", limit),
        cast("int | None", n),
        _shared(sampling),
        chat,
        tuple(line.inputs),
        line.prefix_id,
        line.prefix_tokens,
        None if line.chunks is None else tuple(line.chunks),
    )


_SHARED: dict[str, Mapping[str, object]] = {}


def _shared(sampling: Mapping[str, object]) -> Mapping[str, object]:
    """Return equal parameters as one object: most lines of a file have the same."""
    if not sampling:
        return _NONE
    if len(_SHARED) > _MOST_SHARED:
        _SHARED.clear()
    return _SHARED.setdefault(repr(sampling), sampling)


_MOST_SHARED = 1024


def _chunks(line: Line) -> Iterable[Line]:
    """Return the line itself, or one line per chunk of its document."""
    chunks = line.values.chunks
    if chunks is None:
        return (line,)
    found = []
    for k, chunk in enumerate(chunks):
        own = {"prompt": chunk} if isinstance(chunk, str) else {"prompt_tokens": chunk}
        text = isinstance(chunk, str)
        tokens = None if text else int(chunk)
        values = replace(line.values, chunks=None, prompt_tokens=tokens)
        fields = {n: v for n, v in line.fields.items() if n not in ("chunks", "prompt_tokens")}
        fields |= {**own, "chunk": k, "num_chunks": len(chunks)}
        found.append(Line(f"{line.where}, chunk {k}", f"{line.id}/{k}", line.id, values, fields))
    return found
