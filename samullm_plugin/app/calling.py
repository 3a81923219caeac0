"""Calls of users' functions, in a worker process: what they may return, and what it becomes."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from samullm_plugin.app.functions import Function, Row, Scope, last_line, load
from samullm_plugin.errors import Reject
from samullm_plugin.files import DEEPEST, is_too_deep


@dataclass(frozen=True, slots=True)
class Returned:
    """What became of one row.

    Attributes:
        kind: ``value``, ``dropped`` (it returned None), ``rejected`` (it raised Reject) or
            ``failed``.
        value: JSON; a list of values where a row may become several.
        reason: why it was rejected or failed.
        seconds: how long it took.
    """

    kind: Literal["value", "dropped", "rejected", "failed"]
    value: Any = None
    reason: str = ""
    seconds: float = 0.0


def call_function(
    function: Function, scope: Scope, rows: Sequence[Row], limit_s: float, most: int | None
) -> list[Returned]:
    """Call a function.

    Args:
        function: the function.
        scope: whether it is given the rows one by one or together.
        rows: what it is given.
        limit_s: seconds for each call, after which it is interrupted.
        most: rows that one may become; None: exactly one.

    Returns:
        What became of each row; with scope ``all``, of the rows that went on, the others are
        dropped.

    Raises:
        InputError: if the function cannot be loaded.
    """
    found = load(function.place, function.attribute, function.pickled)
    if scope == "row":
        return [_on_row(found, function, row, limit_s, most) for row in rows]
    began_s = time.monotonic()
    try:
        with _interrupted_after(limit_s * (len(rows) if scope == "batch" else 1)):
            result = found([dict(r) for r in rows], **function.options)
        values = _by_id(result, rows) if scope == "all" else _one_each(result, rows, most)
    except Reject as error:
        values = [Returned("rejected", reason=str(error))] * len(rows)
    except _KindError as error:
        values = [Returned("failed", reason=str(error))] * len(rows)
    except BaseException as error:  # the user's code, which may call sys.exit
        if scope == "batch" and len(rows) > 1:  # find the row that did it
            return [one for r in rows for one in call_function(function, scope, [r], limit_s, most)]
        values = [Returned("failed", reason=_described(error))] * len(rows)
    seconds = (time.monotonic() - began_s) / max(len(rows), 1)
    return [Returned(v.kind, v.value, v.reason, seconds) for v in values]


class _KindError(Exception):
    """The function returned what it may not return; the message says what and what it may."""


class _OverdueError(BaseException):
    """Interrupts a call; no Exception, so that the user's handlers do not catch it."""


def _on_row(found: Any, function: Function, row: Row, limit_s: float, most: int | None) -> Returned:
    began_s = time.monotonic()
    try:
        with _interrupted_after(limit_s):
            result = found(dict(row), **function.options)
            made = _returned(result, most)
    except Reject as error:
        made = Returned("rejected", reason=str(error))
    except _KindError as error:
        made = Returned("failed", reason=str(error))
    except BaseException as error:  # the user's code, which may call sys.exit
        made = Returned("failed", reason=_described(error))
    return Returned(made.kind, made.value, made.reason, time.monotonic() - began_s)


@contextlib.contextmanager
def _interrupted_after(limit_s: float) -> Iterator[None]:
    """Interrupt what runs too long; what holds the interpreter is ended from outside."""

    def interrupt(*_: object) -> None:
        raise _OverdueError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    except _OverdueError:
        raise _KindError(f"took more than {limit_s:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _returned(result: Any, most: int | None) -> Returned:
    """Return what a function's result means for its row."""
    if isinstance(result, Reject):
        return Returned("rejected", reason=str(result))
    if result is None:
        return Returned("dropped")
    if most is not None and hasattr(result, "tolist"):  # arrays: each element is a row
        result = result.tolist()
    if isinstance(result, list | tuple | Iterator):
        if most is None:
            raise _KindError(
                f"returned a {type(result).__name__}; set `max`, the rows one may become, or "
                "return a text, a number or a mapping of fields"
            )
        elements = list(itertools.islice(result, 10 * most))
        if len(elements) > most:
            raise _KindError(f"returned {len(elements)} rows, and `max` is {most}")
        values = [_element(k, v) for k, v in enumerate(elements, 1)]
        return Returned("value", values)
    value = _plain(result)
    return Returned("value", value if most is None else [value])


def _element(number: int, value: Any) -> Any:
    """Return an element of a list of rows as JSON has it."""
    if value is None or isinstance(value, Reject):
        raise _KindError(
            f"returned a list whose element {number} is a {type(value).__name__}; leave out what "
            "is to be no row, or raise Reject for all of them"
        )
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    with contextlib.suppress(TypeError):
        value = _simpler(value)
    if not isinstance(value, str | bool | int | float | Mapping | list):
        raise _KindError(
            f"returned a {type(value).__name__}; it may return a text, a number, a mapping of "
            "fields, a list of these (with `max`), or None to drop the row"
        )
    if isinstance(value, Mapping):
        value = dict(value)
    try:  # as it will be read after a resume
        made = json.loads(json.dumps(value, allow_nan=False, default=_simpler))
    except (TypeError, ValueError, RecursionError) as error:
        raise _KindError(f"returned a {type(value).__name__} that is not JSON: {error}") from error
    if is_too_deep(made):
        raise _KindError(f"returned a value of more than {DEEPEST} levels, one inside of another")
    return made


def _simpler(value: Any) -> Any:
    """Return what stands for a value that JSON does not have: of pydantic, numpy, dataclasses.

    Raises:
        TypeError: if it is nothing of the kind.
    """
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):  # numpy
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is no kind of JSON value")


def _one_each(result: Any, rows: Sequence[Row], most: int | None) -> list[Returned]:
    """Return what a function of a batch says of each of its rows."""
    if not isinstance(result, list | tuple):
        raise _KindError(
            f"returned a {type(result).__name__}; with scope batch it returns a list with one "
            f"result for each of its {len(rows)} rows"
        )
    if len(result) != len(rows):
        raise _KindError(f"returned {len(result)} results for {len(rows)} rows")
    found = []
    for one in result:
        try:
            found.append(_returned(one, most))
        except _KindError as error:
            found.append(Returned("failed", reason=str(error)))
    return found


def _by_id(result: Any, rows: Sequence[Row]) -> list[Returned]:
    """Return what a function of all rows says of each of its rows: those it returned go on."""
    if result is None or isinstance(result, str | bytes | Mapping):
        raise _KindError(
            f"returned a {type(result).__name__}; with scope all it returns a list of the rows "
            "that go on"
        )
    given = {row["id"]: row for row in rows}
    made: dict[str, Any] = {}
    for one in result:
        if not isinstance(one, Mapping) or "id" not in one:
            raise _KindError(
                f"returned a list with a {type(one).__name__}; with scope all it returns rows, "
                "each with the id of one it was given"
            )
        name = one["id"]
        if name not in given:
            raise _KindError(f"returned a row with the id {name!r}, which it was not given")
        if name in made:
            raise _KindError(f"returned the row with the id {name!r} twice")
        before = given[name]
        made[name] = _plain({k: v for k, v in one.items() if k not in before or before[k] != v})
    return [
        Returned("value", made[r["id"]]) if r["id"] in made else Returned("dropped") for r in rows
    ]


def _described(error: BaseException) -> str:
    """Return an error with the lines of the user's code that led to it, last one first."""
    frames = [
        f"{Path(f.filename).name} line {f.lineno}, in {f.name}"
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename != __file__
    ]
    return "; ".join([f"raised {last_line(error)}", *reversed(frames)])
