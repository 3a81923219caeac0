"""Fields and rows of files: their base class, and messages about wrong ones, many in one."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samullm_plugin.errors import InputError, suggest

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Return the mapping a YAML (or JSON) file holds.

    Raises:
        InputError: naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: {error.problem or 'is not YAML'}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a mapping of fields, starting with `version: 1`")
    return value


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice; the second would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping after checking its keys."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the field {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def validate(model: type[Model], value: object, where: str) -> Model:
    """Return ``value`` as a pydantic model.

    Args:
        model: what it must be.
        value: what was read.
        where: file, or file and line, for messages.

    Raises:
        InputError: listing every finding with its field and, for unknown ones, what was meant.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{where}: {describe(error, model)}") from error


_NO_TEXT = "must be a text or a mapping of fields"


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the findings as one line: ``field.path: what is wrong; ...``."""
    findings: dict[str, str] = {}
    for item in error.errors(include_url=False, include_context=False):
        loc = [p for p in item["loc"] if not _is_branch(p)]
        path = ".".join(str(part) for part in loc)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = _fields(model, loc[:-1])
            inside = [k for k in known if loc[-1] in _fields(model, [*loc[:-1], k])]
            if loc[-1] in known:  # of another kind of section than the other fields say
                message = "is not a field beside the others that are given here"
            elif inside:
                message = f"unknown field (did you mean {inside[0]}.{loc[-1]}?)"
            else:
                message = f"unknown field{suggest(str(loc[-1]), known)}"
            if known and loc[-1] not in known and "did you mean" not in message:
                message += f"; known: {', '.join(sorted(known))}"
        elif item["type"] == "missing":
            message = "missing"
        elif item["type"] == "string_pattern_mismatch":
            message = f"{item['input']!r}: use letters, digits and . _ - only, no . _ - first"
        elif isinstance(item["input"], str | int | float | bool | None):
            message += f", not {item['input']!r}"
        if item["type"] == "string_type" and isinstance(item["input"], list | dict):
            message = _NO_TEXT
        if item["type"] == "value_error" and findings.get(path) == _NO_TEXT:
            del findings[path]  # what is wrong in the mapping says more
        findings.setdefault(path, message)  # of the forms a field may take, the first is enough
    for path in list(findings):  # a finding inside a mapping says more than that it is no text
        if any(other.startswith(f"{path}.") for other in findings):
            del findings[path]
    return "; ".join(f"{path}: {text}" if path else text for path, text in findings.items())


def _is_branch(part: int | str) -> bool:
    """Return whether a part of a location names a member of a union rather than a field."""
    return isinstance(part, str) and (
        part in ("str", "int", "bool", "float", "dict", "class", "[key]")
        or part.startswith(("list[", "dict[", "constrained-", "function-", "literal["))
        or part.endswith("Section")
    )


def _fields(model: type[BaseModel], loc: list[int | str]) -> set[str]:
    """Return the names of the fields at a location."""
    found: list[Any] = [model]
    for part in loc:
        found = [inner for outer in found for inner in _step(outer, part)]
    names: set[str] = set()
    for kind in found:
        for cls in _models(kind):
            names |= {f.alias or n for n, f in cls.model_fields.items()}
    return names


def _step(kind: Any, part: int | str) -> list[Any]:
    """Return the types that a part of a location leads to."""
    found = []
    for option in _options(kind):
        origin = get_origin(option)
        if isinstance(option, type) and issubclass(option, BaseModel):
            for name, field in option.model_fields.items():
                if part in (name, field.alias):
                    found.append(field.annotation)
        elif origin is not None and get_args(option):
            found.append(get_args(option)[-1])
    return found


def _options(kind: Any) -> list[Any]:
    """Return the members of a union, or the type itself, without annotations."""
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [inner for member in get_args(kind) for inner in _options(member)]
    return [kind]


def _models(kind: Any) -> list[type[BaseModel]]:
    return [o for o in _options(kind) if isinstance(o, type) and issubclass(o, BaseModel)]


LARGEST = 2**31 - 1
"""Largest count of tokens or of anything else, and largest token id."""

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
NumGpus = Annotated[int, Field(le=65_536)]


class Section(BaseModel):
    """Base of every part of a file that users write: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


SHOWN_FINDINGS = 20
"""So many different findings are listed in full; of the rest, only where they are."""

_PLACE = re.compile(r"(.*) (line|row) (\d+)(.*)", re.DOTALL)


def bad_rows_message(bad: Mapping[str, str], remedy: str = "") -> str:
    """Return one line that names every bad row.

    Args:
        bad: what is wrong, by where the row is.
        remedy: what comes of them; by default, what to do about them.
    """
    remedy = remedy or ("correct them, or write `on_bad_row: skip` in app.yaml to run the others")
    if len(bad) == 1:
        ((where, reason),) = bad.items()
        return f"{where}: {reason} ({remedy})"
    groups: dict[tuple[str, str], list[str]] = {}
    for where, reason in bad.items():
        found = _PLACE.fullmatch(where)
        file, place = (found[1], f"{found[2]} {found[3]}{found[4]}") if found else ("", where)
        groups.setdefault((file, reason), []).append(place)
    told = [
        f"{file + ' ' if file else ''}{_ranges(places)}: {reason}"
        for (file, reason), places in list(groups.items())[:SHOWN_FINDINGS]
    ]
    rest = [
        f"{file + ' ' if file else ''}{place}"
        for (file, _), places in list(groups.items())[SHOWN_FINDINGS:]
        for place in places
    ]
    if rest:
        told.append(f"also {_ranges(rest)}")
    return f"{len(bad)} bad rows: {'; '.join(told)} ({remedy})"


def _ranges(places: list[str]) -> str:
    """Return places as text, consecutive lines as ranges."""
    parts: list[str] = []
    last: tuple[str, int, int] | None = None
    for place in places:
        head, _, number = place.rpartition(" ")
        if not number.isdecimal():
            parts.append(place)
            last = None
        elif last is not None and last[0] == head and int(number) == last[2] + 1:
            last = (head, last[1], int(number))
            parts[-1] = f"{head}s {last[1]}-{last[2]}"
        else:
            last = (head, int(number), int(number))
            parts.append(place)
    return ", ".join(parts)
