"""Functions of rows: bundled ones by their name, and users' own, which are found and described.

:func:`load` and :func:`describe_function` run in a worker process; nothing of the user's is
imported anywhere else.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from samullm_plugin.app.expressions import ExpressionError, parsed
from samullm_plugin.errors import InputError

Row = Mapping[str, Any]
"""A row's fields by name."""


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


Scope = Literal["row", "batch", "all"]


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
        raise InputError(f"{place} cannot be imported: {last_line(error)}") from error
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


def last_line(error: BaseException) -> str:
    """Return the last line of an error's traceback."""
    return " ".join("".join(traceback.format_exception_only(error)).split())
