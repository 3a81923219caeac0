"""Requests as JSON lines: one object per line, read and checked with its line number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from samullm_plugin.app.fields import validate
from samullm_plugin.app.spec import SamplingSection
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


def read_requests(path: Path, notes: list[str]) -> tuple[Line, ...]:
    """Return the requests of a JSONL file; a line with ``chunks`` becomes one request per chunk.

    Lines of the OpenAI batch format (``custom_id`` and ``body``) are understood as well.

    Args:
        path: the file; empty lines are skipped.
        notes: remarks for the user are added here.

    Raises:
        InputError: naming file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such requests file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    lines: list[Line] = []
    first_of: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for number, row in enumerate(text.splitlines(), start=1):
        if not row.strip():
            continue
        where = f"{path} line {number}"
        for line in _chunks(_line(row, number, where)):
            if line.id in first_of:
                raise InputError(
                    f"{where}: the id {line.id!r} is already that of {first_of[line.id]}; ids "
                    "must be unique in a file"
                )
            first_of[line.id] = f"line {number}"
            lines.append(line)
            for name in line.values.model_extra or ():
                if (close := suggest(name, RequestLine.model_fields)) and name not in unknown:
                    unknown[name] = f"{where}: the field {name!r} is kept for templates only{close}"
    if not lines:
        raise InputError(f"{path}: it holds no requests")
    notes.extend(unknown.values())
    return tuple(lines)


def _line(row: str, number: int, where: str) -> Line:
    """Return one line, checked."""
    try:
        value = json.loads(row)
    except ValueError as error:
        raise InputError(
            f"{where}: is not JSON: {error}; each line must be one JSON object"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object, not {type(value).__name__}")
    fields = dict(value)
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
