"""One request as a line or row says it, checked field by field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from samullm_plugin.app.bodies import (
    CHAT_OPTIONS,
    BodyError,
    check_chat,
    check_messages,
    from_batch,
)
from samullm_plugin.app.fields import Count, Natural, describe
from samullm_plugin.app.keptrows import Fields
from samullm_plugin.app.sampling import SamplingSection
from samullm_plugin.model.application import ModelSpec

CHARACTERS_PER_TOKEN = 4

V = TypeVar("V")

TokenCounter = Callable[[ModelSpec, str], int | None]
"""Counts the tokens of a text for a model; None if it has no tokenizer for it."""


def estimate_tokens(text: str) -> int:
    """Return a rough number of tokens: one per four characters, rounded up."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def _id(value: object) -> object:
    """Return a whole number as a text; tables with an empty cell often have 3.0 for 3."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return str(value) if type(value) is int else value


Id = Annotated[str, BeforeValidator(_id)]


class RequestLine(BaseModel):
    """One line of a requests file; fields of other names are kept for templates and joins."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Id | None = Field(default=None, min_length=1)
    prompt: str | None = None
    messages: list[Mapping[str, JsonValue]] | None = None
    prompt_tokens: Count | None = None
    prompt_token_ids: list[Natural] | None = Field(default=None, min_length=1)
    max_tokens: Count | None = None
    sampling_params: SamplingSection | None = None
    inputs: list[str] | None = None
    prefix_id: Id | None = None
    prefix_tokens: Natural = 0
    chunks: list[str | Count] | None = Field(default=None, min_length=1)


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

    @property
    def says_prompt(self) -> bool:
        """Whether it says more of its prompt than the text."""
        own = (self.prompt_tokens, self.prompt_token_ids, self.prefix_id)
        return own != (None, None, None)


PLAIN = LineValues()
"""What lines say that only have a text."""

_SPECIAL = RequestLine.model_fields.keys() - {"id", "prompt", "messages"}
UNUSUAL = _SPECIAL | {"messages", "body", "custom_id"}
"""Fields that rows with nothing but an id and a text do not have."""


class Checked(NamedTuple):
    """A row that is a request.

    Attributes:
        id: its own, or that of its number.
        values: its known fields.
        fields: all of them.
    """

    id: str
    values: LineValues
    fields: Fields


class RowError(ValueError):
    """A row that is no request; the message says why."""


def requested(row: Fields) -> Fields:
    """Return the fields of a request, whatever form it is written in.

    Raises:
        RowError: naming the field that is wrong.
    """
    fields = row
    if "body" in row and isinstance(row["body"], Mapping):
        try:
            fields = from_batch(row)
        except BodyError as error:
            raise RowError(str(error)) from error
    elif "custom_id" in row:
        fields = {n: v for n, v in row.items() if n != "custom_id"}
        fields.setdefault("id", row["custom_id"])
    # A column that a row leaves empty is as good as not there, where the field is known.
    if None in fields.values():
        known = RequestLine.model_fields
        fields = {n: v for n, v in fields.items() if v is not None or n not in known}
    return fields


def checked(row: Fields, number: int) -> Checked:
    """Return a row as a request.

    Args:
        row: its fields.
        number: of the row in its table, from 1.

    Raises:
        RowError: naming the field that is wrong.
    """
    fields = requested(row)
    own = fields.get("id", f"line-{number}")
    usual = isinstance(own, str) and own != "" and isinstance(fields.get("prompt", ""), str)
    if usual and UNUSUAL.isdisjoint(fields):
        return Checked(own, PLAIN, fields)
    origins = [n for n in ("prompt", "messages", "prompt_token_ids", "chunks") if n in fields]
    if len(origins) > 1:
        raise RowError(f"give {' or '.join(origins)}, not both")
    messages, chat = fields.get("messages"), _NONE
    if messages is not None:
        if not isinstance(messages, list):
            raise RowError("messages: must be a list")
        if (wrong := check_messages(messages)) is not None:
            raise RowError(wrong)
        chat = {n: fields[n] for n in CHAT_OPTIONS if fields.get(n) is not None}
        if (wrong := check_chat(chat)) is not None:
            raise RowError(wrong)
    if usual and _SPECIAL.isdisjoint(fields):
        values = PLAIN if not chat else LineValues(chat=chat)
    else:
        own, values = _special(fields, chat)
    own = f"line-{number}" if own is None else own
    return Checked(own, values, fields)


_NONE: Mapping[str, object] = {}


def _special(fields: Fields, chat: Mapping[str, object]) -> tuple[str | None, LineValues]:
    """Return id and values of a row with more than a text."""
    known = {n: v for n, v in fields.items() if n in RequestLine.model_fields and n != "messages"}
    own, prompt = known.get("id"), known.get("prompt", "")
    rest = {n: v for n, v in known.items() if n not in ("id", "prompt")}
    usual = own is None or (type(own) is str and own)
    if not (usual and type(prompt) is str and _REPEATED.issuperset(rest)):
        return _validated(known, chat)
    values = _remembered(_VALUES, repr(rest), lambda: _validated(rest, _NONE)[1])
    return own, replace(values, chat=chat) if chat else values


_REPEATED = frozenset(
    {"max_tokens", "sampling_params", "prompt_tokens", "prefix_id", "prefix_tokens"}
)
"""Fields in which many lines of a file are alike: what they say is checked once."""
_VALUES: dict[str, LineValues] = {}


def _validated(known: Fields, chat: Mapping[str, object]) -> tuple[str | None, LineValues]:
    """Return id and values of a row from its known fields."""
    try:
        line = RequestLine.model_validate(known)
    except ValidationError as error:
        raise RowError(describe(error, RequestLine)) from error
    if _SPECIAL.isdisjoint(known) and not chat:
        return line.id, PLAIN
    sampling = line.sampling_params.given() if line.sampling_params else {}
    n = sampling.pop("n", None)
    limit = sampling.pop("max_tokens", None)
    return line.id, LineValues(
        line.prompt_tokens,
        None if line.prompt_token_ids is None else tuple(line.prompt_token_ids),
        line.max_tokens or cast("int | None", limit),
        cast("int | None", n),
        _shared(sampling),
        chat,
        tuple(line.inputs or ()),
        line.prefix_id,
        line.prefix_tokens,
        None if line.chunks is None else tuple(line.chunks),
    )


_SHARED: dict[str, Mapping[str, object]] = {}


def _shared(sampling: Mapping[str, object]) -> Mapping[str, object]:
    """Return equal parameters as one object: most lines of a file have the same."""
    return _remembered(_SHARED, repr(sampling), lambda: sampling) if sampling else _NONE


def _remembered(known: dict[str, V], key: str, make: Callable[[], V]) -> V:
    """Return what was made for a key before, else make it; a few at a time are remembered."""
    if (found := known.get(key)) is None:
        if len(known) > _MOST_SHARED:
            known.clear()
        found = known[key] = make()
    return found


_MOST_SHARED = 1024
