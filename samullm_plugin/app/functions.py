"""Functions that users write: where they are, whether they can be called, and what they return.

:func:`call_function` and :func:`describe_function` run in a worker process; nothing of the user's
is imported anywhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import importlib.util
import inspect
import itertools
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from samullm_plugin.app.expressions import ExpressionError, parsed
from samullm_plugin.errors import InputError, Reject
from samullm_plugin.files import DEEPEST, is_too_deep

Scope = Literal["row", "batch", "all"]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Function:
    """A user's function.

    Attributes:
        name: as it was written, for messages.
        place: file or module; empty for bundled functions and pickled ones.
        attribute: its name there, or that of a bundled function.
        options: further arguments by name.
        pickled: the function itself, where it has no place of its own (a notebook's).
    """

    name: str
    place: str
    attribute: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pickled: bytes | None = None

    def __hash__(self) -> int:
        """Hash by place and name."""
        return hash((self.place, self.attribute, self.pickled))


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


def function_of(
    written: str | Callable[..., Any], folder: Path, options: Mapping[str, Any], where: str
) -> Function:
    """Return the function that a field names.

    Args:
        written: ``file.py:name``, ``module:name``, ``best by FIELD``, ``vote``, or the function.
        folder: what files are relative to.
        options: further arguments.
        where: file and field, for messages.

    Raises:
        InputError: if it names none.
    """
    if callable(written):
        return _of_callable(written, options, where)
    if (by := chosen_by(written)) is not None:
        name = written.split()[0]
        if name == "best" and " by " not in written:
            raise InputError(f"{where}: say what is best: `best by FIELD`, such as `best by score`")
        try:
            parsed(by)
        except ExpressionError as error:
            raise InputError(f"{where}: {error}") from error
        return Function(written, "", name, {**options, "by": by})
    place, colon, attribute = written.rpartition(":")
    if not colon or not place or not attribute.isidentifier():
        raise InputError(
            f"{where}: {written!r} names no function; write file.py:name, module:name, "
            "`best by FIELD` or `vote by FIELD`"
        )
    if place.endswith(".py"):
        path = (folder / place).resolve()
        if not path.is_file():
            raise InputError(f"{where}: there is no file {path}")
        place = str(path)
    return Function(written, place, attribute, dict(options))


def chosen_by(written: str | Callable[..., Any]) -> str | None:
    """Return the expression by which a bundled function chooses; None: it is none of those."""
    name, _, by = written.partition(" by ") if isinstance(written, str) else ("", "", "")
    return (by.strip() or "output") if name.strip() in BUNDLED else None


def _of_callable(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> Function:
    name = getattr(function, "__qualname__", type(function).__name__)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    importable = module is not None and module.__name__ != "__main__"
    if module is not None and importable and getattr(module, name, None) is function:
        return Function(f"{module.__name__}:{name}", module.__name__, name, dict(options))
    import cloudpickle

    try:
        data = cloudpickle.dumps(function)
    except Exception as error:  # whatever it holds on to
        raise InputError(
            f"{where}: the function {name} cannot be sent to another process ({error}); put it "
            "into a module"
        ) from error
    return Function(name, "", name, dict(options), data)


# --- in a worker process ---


@lru_cache(maxsize=64)
def load(place: str, attribute: str, pickled: bytes | None = None) -> Any:
    """Return what is under a name in a file or module.

    Raises:
        InputError: if there is no such name, or importing the file raises.
    """
    if pickled is not None:
        import cloudpickle

        return cloudpickle.loads(pickled)
    if not place:
        return BUNDLED[attribute]
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(
            place
        )  # fmt: skip
    except Exception as error:  # the user's code
        raise InputError(f"{place} cannot be imported: {_last_line(error)}") from error
    if not hasattr(module, attribute):
        from samullm_plugin.errors import suggest

        names = [n for n in dir(module) if not n.startswith("_")]
        known = suggest(attribute, names) or f"; it has {', '.join(names) or 'no names'}"
        raise InputError(f"{place} has no {attribute!r}{known}")
    return getattr(module, attribute)


def _import_file(path: Path) -> Any:
    """Import a file under a name of its own; modules beside it can be imported by it."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def describe_function(function: Function, scope: Scope) -> None:
    """Check that a function is there and takes what it will be given.

    Raises:
        InputError: naming what is missing or does not fit, with the remedy.
    """
    found = load(function.place, function.attribute, function.pickled)
    if not callable(found):
        raise InputError(f"{function.name} is a {type(found).__name__}, not a function")
    if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
        raise InputError(
            f"{function.name} is async and gives no value when it is called; give a plain "
            "function, which may use asyncio.run"
        )
    if inspect.isgeneratorfunction(found):
        raise InputError(f"{function.name} yields; give a function that returns a list of values")
    given = "a row" if scope == "row" else "a list of rows"
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return  # of a function written in C
    try:
        signature.bind({}, **function.options)
    except TypeError as error:
        options = f" and {', '.join(function.options)}" if function.options else ""
        raise InputError(
            f"{function.name}{signature} cannot be called with {given}{options}: {error}; with "
            f"scope {scope} it takes {given} first, and `options` by name"
        ) from error


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


def _last_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())


def _described(error: BaseException) -> str:
    """Return an error with the lines of the user's code that led to it, last one first."""
    frames = [
        f"{Path(f.filename).name} line {f.lineno}, in {f.name}"
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename != __file__
    ]
    return "; ".join([f"raised {_last_line(error)}", *reversed(frames)])


# --- bundled functions ---


def _candidates(row: Row) -> list[Row]:
    """Return the rows among which a function chooses: those of its only input.

    A row's own conversation is a list of mappings as well, and no input.
    """
    lists = [
        v
        for v in row.values()
        if isinstance(v, list)
        and v
        and isinstance(v[0], Mapping)
        and not {"role", "content"} <= v[0].keys()
    ]
    if len(lists) != 1:
        raise ValueError(f"it chooses among the rows of one input, and there are {len(lists)}")
    return list(lists[0])


def _with_values(row: Row, by: str) -> list[tuple[Row, Any]]:
    """Return the candidates with what an expression makes of each; without those of no value."""
    expression = parsed(by)
    made = [(candidate, expression.value(candidate)) for candidate in _candidates(row)]
    return [(candidate, value) for candidate, value in made if value is not None]


def best(row: Row, by: str) -> Row | None:
    """Return the row of the input for which an expression is highest; the first of equal ones.

    None: none of them has a value.
    """
    found = _with_values(row, by)
    return max(found, key=lambda pair: pair[1])[0] if found else None


def vote(row: Row, by: str) -> Row | None:
    """Return the first row with the value that most have; ``votes`` and ``share`` say how many.

    None: none of them has a value.
    """
    candidates = _with_values(row, by)
    values = [json.dumps(value, sort_keys=True) for _, value in candidates]
    if not values:
        return None
    winner = max(values, key=values.count)
    votes = values.count(winner)
    chosen = {"winner": json.loads(winner), "votes": votes, "share": votes / len(values)}
    return {**candidates[values.index(winner)][0], **chosen}


BUNDLED: Mapping[str, Callable[..., Any]] = {"best": best, "vote": vote}
"""Functions with a name of their own."""
