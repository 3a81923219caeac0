"""Dataclasses as JSON and back, by their annotations, with the path of whatever is wrong."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.latency import StepLatency, StepModel
from samullm_plugin.planning.arrays import decode_array, encode_array, read_float

T = TypeVar("T")

_STEP_TYPE = "step_model"


def to_record(value: Any) -> Any:
    """Return dataclasses, arrays, tuples and plain values as JSON has them.

    Fields that follow from others (``init=False``) are left out.

    Raises:
        InputError: for an iteration latency that is neither a ``StepLatency`` nor has ``to_json``.
    """
    if isinstance(value, np.ndarray):
        return encode_array(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, StepModel) and not isinstance(value, StepLatency):
        return _foreign_step_model(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init)
        return {name: to_record(inner) for name, inner in pairs}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: to_record(inner) for key, inner in value.items()}
        return [[to_record(key), to_record(inner)] for key, inner in value.items()]
    if isinstance(value, tuple | list):
        return [to_record(inner) for inner in value]
    if isinstance(value, np.generic):
        return to_record(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _foreign_step_model(model: object) -> dict[str, object]:
    """Return an iteration latency that knows how to write itself."""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    write = getattr(model, "to_json", None)
    if write is None:
        raise InputError(
            f"iteration latency {kind} cannot be stored: it is not a StepLatency and has no "
            "to_json(); use a latency model with one, such as linear"
        )
    return {_STEP_TYPE: kind, "data": write()}


class RecordReader:
    """Builds dataclasses from JSON.

    Args:
        source: file, for messages.
        step_models: by ``module.Class``, what makes an iteration latency of another type than
            ``StepLatency`` from its own JSON; nothing is imported on a file's word.
    """

    def __init__(self, source: str, step_models: Mapping[str, Any] | None = None) -> None:
        """Keep where the records come from."""
        self.source = source
        self.step_models = step_models or {}

    def read(self, kind: type[T], record: object, path: str = "") -> T:
        """Return ``record`` as ``kind``.

        Raises:
            InputError: naming file, path and what is wrong.
        """
        return cast("T", self._value(kind, record, path))

    def _fail(self, path: str, message: str) -> InputError:
        return InputError(
            f"{self.source}: {path}: {message}" if path else f"{self.source}: {message}"
        )

    def _value(self, kind: Any, record: Any, path: str) -> Any:
        """Return a value of any annotation that occurs in stored types."""
        origin, arguments = get_origin(kind), get_args(kind)
        if kind is Any or kind is object:
            return _frozen(record)
        if kind is StepModel:
            return self._step_model(record, path)
        if origin in (Union, types.UnionType):
            if record is None and type(None) in arguments:
                return None
            inner = [a for a in arguments if a is not type(None)]
            return self._value(inner[0], record, path)
        if origin is Literal:
            if record not in arguments:
                raise self._fail(path, f"must be one of {', '.join(map(repr, arguments))}")
            return record
        if origin is np.ndarray:
            number = get_args(arguments[1])[0]
            return decode_array(record, np.dtype(number), f"{self.source}: {path}")
        if origin is tuple:
            return self._tuple(arguments, record, path)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self._mapping(arguments, record, path)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(cast("type", kind), record, path)
        return self._plain(kind, record, path)

    def _plain(self, kind: Any, record: Any, path: str) -> Any:
        """Return a text, a number, a truth value or a member of an enumeration."""
        if isinstance(kind, type) and issubclass(kind, Enum):
            try:
                return kind(record)
            except ValueError:
                values = ", ".join(repr(member.value) for member in kind)
                raise self._fail(path, f"must be one of {values}") from None
        if kind is float:
            number = read_float(record)
            if number is None:
                raise self._fail(path, "must be a number")
            return number
        if isinstance(record, bool) != (kind is bool) or not isinstance(record, kind):
            raise self._fail(path, f"must be of type {kind.__name__}")
        return record

    def _tuple(self, arguments: tuple[Any, ...], record: Any, path: str) -> tuple[Any, ...]:
        """Return a tuple of one length or another."""
        if not isinstance(record, list):
            raise self._fail(path, "must be a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            kinds = [arguments[0]] * len(record)
        else:
            kinds = list(arguments)
        if len(kinds) != len(record):
            raise self._fail(path, f"must have {len(kinds)} entries")
        pairs = zip(kinds, record, strict=True)
        return tuple(
            self._value(k, r, f"{path}.{i}" if path else str(i)) for i, (k, r) in enumerate(pairs)
        )

    def _mapping(self, arguments: tuple[Any, ...], record: Any, path: str) -> dict[Any, Any]:
        """Return a mapping: an object for text keys, else a list of pairs."""
        key, value = arguments
        if key is str and isinstance(record, dict):
            return {k: self._value(value, v, f"{path}.{k}") for k, v in record.items()}
        if key is str or not isinstance(record, list):
            raise self._fail(path, "must be an object" if key is str else "must be a list of pairs")
        pairs = [self._tuple((key, value), pair, f"{path}.{i}") for i, pair in enumerate(record)]
        return dict(pairs)

    def _dataclass(self, kind: type, record: Any, path: str) -> Any:
        """Return an instance, its own checks included."""
        if not isinstance(record, dict):
            raise self._fail(path, f"must be an object with the fields of a {kind.__name__}")
        hints = _hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind) if f.init}
        values = {}
        for name, inner in record.items():
            if name not in known:
                raise self._fail(
                    f"{path}.{name}".lstrip("."), f"unknown field{suggest(name, known)}"
                )
            values[name] = self._value(hints[name], inner, f"{path}.{name}".lstrip("."))
        for name, field in known.items():
            optional = (
                field.default is not dataclasses.MISSING
                or field.default_factory is not dataclasses.MISSING
            )
            if name not in values and not optional:
                raise self._fail(f"{path}.{name}".lstrip("."), "missing")
        try:
            return kind(**values)
        except InputError as error:
            raise self._fail(path, str(error)) from error

    def _step_model(self, record: Any, path: str) -> StepModel:
        """Return an iteration latency."""
        if not (isinstance(record, dict) and _STEP_TYPE in record):
            return cast("StepModel", self._dataclass(StepLatency, record, path))
        kind = record[_STEP_TYPE]
        if kind not in self.step_models:
            raise self._fail(
                path, f"an iteration latency of type {kind} cannot be read without its plugin"
            )
        return cast("StepModel", self.step_models[kind](record.get("data")))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _frozen(value: Any) -> Any:
    """Return lists as tuples, however deep."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
