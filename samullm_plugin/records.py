"""Dataclasses as JSON and back, by their annotations."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from samullm_plugin.errors import InputError, describe_validation

T = TypeVar("T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_record(value: Any) -> Any:
    """Return a dataclass as JSON has it; numbers of numpy, which plugins may use, as plain ones."""
    kind: Any = type(value)
    return _adapter(kind).dump_python(
        value, mode="json", warnings=False, fallback=lambda inner: inner.tolist()
    )


def read_record(kind: type[T], record: object, source: str) -> T:
    """Return a dataclass from what :func:`to_record` made of it.

    Args:
        kind: the dataclass.
        record: what was read.
        source: file and place in it, for messages.

    Raises:
        InputError: naming the source, the field and what is wrong with it.
    """
    try:
        wanted: Any = kind
        found: T = _adapter(wanted).validate_json(to_json(record), strict=True, extra="forbid")
    except ValidationError as error:
        raise InputError(f"{source}: {describe_validation(error)}") from error
    except InputError as error:  # of the dataclass's own checks
        raise InputError(f"{source}: {error}") from error
    return found
