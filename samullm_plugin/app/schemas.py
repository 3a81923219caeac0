"""What outputs must be: from ``output_schema`` to vLLM's structured outputs, and back to values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

from samullm_plugin.app.functions import Function, load
from samullm_plugin.errors import InputError, Reject
from samullm_plugin.files import DEEPEST, is_too_deep


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema of outputs.

    Attributes:
        kind: vLLM's name of the constraint.
        text: the JSON schema as JSON, the regular expression, or the choices as a JSON list.
    """

    kind: Literal["json", "regex", "choice"]
    text: str

    @property
    def structured_outputs(self) -> dict[str, object]:
        """Return vLLM's ``structured_outputs``."""
        if self.kind == "regex":  # engines know no named groups
            return {self.kind: _SPECIAL.sub(_unnamed, self.text)}
        return {self.kind: json.loads(self.text)}

    @property
    def properties(self) -> frozenset[str] | None:
        """Return the fields that values have; None if they may have any."""
        if self.kind == "regex":
            return frozenset(re.compile(self.text).groupindex)
        if self.kind == "choice":
            return frozenset()
        schema = json.loads(self.text)
        if schema.get("type") != "object" or "properties" not in schema:
            return None
        return frozenset(schema["properties"])

    def parse(self, text: str) -> Any:
        """Return the value of an output.

        Raises:
            Reject: if the output does not follow the schema.
        """
        if self.kind != "json":
            return self.value(text)
        value = _read(text)
        if is_too_deep(value):
            raise Reject(f"is of more than {DEEPEST} levels, one inside of another")
        finding = next(iter(_validator(self.text).iter_errors(value)), None)
        if finding is not None:
            at = ".".join(str(p) for p in finding.absolute_path)
            raise Reject(f"{at}: {finding.message}" if at else finding.message)
        return self._filled(value)

    def value(self, text: str) -> Any:
        """Return the value of an output, of JSON without a look at whether it is as it must be.

        Raises:
            Reject: if it has none.
        """
        if self.kind == "regex":
            match = re.fullmatch(self.text, text, re.DOTALL)
            if match is None:
                raise Reject(f"does not match the regular expression {self.text!r}")
            return match.groupdict() or text
        if self.kind == "choice":
            choices = json.loads(self.text)
            if text not in choices:
                raise Reject(f"is none of {', '.join(map(repr, choices))}")
            return text
        return self._filled(_read(text))

    def _filled(self, value: Any) -> Any:
        """Return a value of JSON with the defaults of the fields that it lacks."""
        if '"default"' in self.text:
            root = _parsed(self.text)
            _fill_in(value, root, root)
        return value

    def example(self) -> Any:
        """Return a value as small as the schema lets one be."""
        if self.kind == "regex":
            return dict.fromkeys(re.compile(self.text).groupindex, "") or ""
        if self.kind == "choice":
            return json.loads(self.text)[0]
        schema = json.loads(self.text)
        return _example(schema, schema)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Reject(f"is not JSON: {error}") from error


_SPECIAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:P<\w+>|P=\w+\)|<?[=!])", re.DOTALL)
"""Parts of a regular expression that are not just characters: escapes, sets, kinds of groups."""


def _unnamed(part: re.Match[str]) -> str:
    """Return a part of a regular expression; of the beginning of a named group, that of a plain."""
    return "(" if part[0].startswith("(?P<") else part[0]


def regex_schema(pattern: str, where: str) -> Schema:
    """Return a regular expression as a schema.

    Raises:
        InputError: if it has a part that no engine can generate by.
    """
    for part in _SPECIAL.finditer(pattern):
        if part[0].startswith(("(?=", "(?!", "(?<=", "(?<!")):
            what = "looks ahead or back"
        elif part[0].startswith("(?P=") or re.match(r"\\[1-9]", part[0]):
            what = "refers to a group"
        elif part[0] in ("\\b", "\\B"):
            what = "is a boundary of words"
        else:
            continue
        raise InputError(
            f"{where}: no engine can generate by it: {part[0]!r} {what}; say it otherwise, or "
            "leave it to `check`"
        )
    return Schema("regex", pattern)


def _fill_in(value: Any, schema: Any, root: Mapping[str, Any]) -> None:
    """Give objects within a value the defaults of the fields that they lack.

    Args:
        value: it is changed.
        schema: what it follows; where it has a choice of several, that of objects, if there is one.
        root: what references point into.
    """
    if isinstance(schema, Mapping) and "$ref" in schema:
        schema = find_reference(str(schema["$ref"]), root)
    if not isinstance(schema, Mapping):
        return
    if isinstance(value, list):
        for element in value:
            _fill_in(element, schema.get("items"), root)
    if not isinstance(value, dict):
        return
    choices = [c for c in schema.get("anyOf", ()) if c != {"type": "null"}]
    for part in (*schema.get("allOf", ()), *(choices if len(choices) == 1 else ())):
        _fill_in(value, part, root)
    for name, inner in (schema.get("properties") or {}).items():
        if name in value:
            _fill_in(value[name], inner, root)
        elif isinstance(inner, Mapping) and "default" in inner:
            value[name] = json.loads(json.dumps(inner["default"]))


SchemaResolver = Callable[[Function, str], Mapping[str, Any]]
"""Returns the JSON schema of the class in a place; the text names file and field."""


def schema_of_class(place: Function, where: str) -> Mapping[str, Any]:
    """Return the JSON schema of a pydantic model.

    Raises:
        InputError: if there is none in this place.
    """
    try:
        found = load(place.place, place.attribute, place.pickled)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if not hasattr(found, "model_json_schema"):
        raise InputError(
            f"{where}: {place.name} is a {type(found).__name__}, not a pydantic model; give a "
            "subclass of pydantic.BaseModel, or a JSON schema"
        )
    schema: Mapping[str, Any] = found.model_json_schema()
    return schema


@lru_cache(maxsize=64)
def _validator(text: str) -> Any:
    from jsonschema.validators import validator_for

    schema = _parsed(text)
    return validator_for(schema)(schema)


@lru_cache(maxsize=64)
def _parsed(text: str) -> Mapping[str, Any]:
    """Return a schema; it must not be changed."""
    schema: Mapping[str, Any] = json.loads(text)
    return schema


def json_schema(schema: Mapping[str, Any], where: str) -> Schema:
    """Return a JSON schema after checking it.

    Raises:
        InputError: naming what is wrong with it.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    plain = json.loads(json.dumps(schema))
    try:
        validator_for(plain).check_schema(plain)
    except SchemaError as error:
        at = ".".join(str(p) for p in error.absolute_path)
        raise InputError(
            f"{where}{f'.{at}' if at else ''}: is not a JSON schema: {error.message}"
        ) from error
    if (endless := _endless(plain, plain)) is not None:
        raise InputError(
            f"{where}: {endless} refers to itself without going into a field or an element, so no "
            "output can be checked"
        )
    if (found := _contradiction(plain, plain, "")) is not None:
        at, what = found
        raise InputError(f"{where}{at}: no output can follow the schema: {what}")
    known = {"type", "properties", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "items"}
    if not known & plain.keys():
        raise InputError(
            f"{where}: a JSON schema says at least a type; or give regex, choice, or the place of "
            "a pydantic model as module:Class"
        )
    return Schema("json", json.dumps(plain, sort_keys=True))


def find_reference(reference: str, root: Mapping[str, Any]) -> Any:
    """Return the part of a JSON schema that a pointer into it means (RFC 6901).

    None: there is no such part, or the reference is no pointer into the schema.
    """
    if reference == "#":
        return root
    if not reference.startswith(_POINTER):
        return None
    found: Any = root
    for part in reference.removeprefix(_POINTER).split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, Mapping) and name in found:
            found = found[name]
        else:
            return None
    return found


_POINTER = "#/"
_LIMITS = (
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
    ("minimum", "maximum"),
)


def _endless(schema: Any, root: Mapping[str, Any]) -> str | None:
    """Return a reference within a schema that leads to itself with the same value; None: none."""
    if isinstance(schema, list):
        return next((f for v in schema if (f := _endless(v, root))), None)
    if not isinstance(schema, Mapping):
        return None
    reference = schema.get("$ref")
    if isinstance(reference, str):
        seen, left = set[str](), [reference]
        while left:
            new = set(_of_same_value(find_reference(left.pop(), root)))
            if reference in new:
                return reference
            left += new - seen
            seen |= new
    return next((f for v in schema.values() if (f := _endless(v, root))), None)


def _of_same_value(schema: Any) -> Iterator[str]:
    """Yield the references that a schema applies to the value that it is applied to."""
    if not isinstance(schema, Mapping):
        return
    if isinstance(schema.get("$ref"), str):
        yield schema["$ref"]
    lists = [v for k in ("allOf", "anyOf", "oneOf") if isinstance(v := schema.get(k), list)]
    for part in (*chain(*lists), *(schema.get(k) for k in ("not", "if", "then", "else"))):
        yield from _of_same_value(part)


def _contradiction(schema: Any, root: Mapping[str, Any], at: str) -> tuple[str, str] | None:
    """Return the place within a schema that no value follows, and why; None if none is found.

    What is looked for are limits the wrong way round, choices of nothing, required fields that must
    not be there, and references to nothing; not what several parts say together.
    """
    if isinstance(schema, list):
        parts = ((f"{at}.{k}", v) for k, v in enumerate(schema))
        return next((f for place, v in parts if (f := _contradiction(v, root, place))), None)
    if not isinstance(schema, Mapping):
        return None
    if schema.get("enum") == []:
        return f"{at}.enum", "it has no values to choose from"
    for least, most in _LIMITS:
        low, high = schema.get(least), schema.get(most)
        if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
            return at, f"{least} {low} is above {most} {high}"
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        for name in schema.get("required", ()):
            if properties.get(name) is False:
                return f"{at}.properties.{name}", "a required field is false"
    reference = schema.get("$ref")
    points = isinstance(reference, str) and reference.startswith(_POINTER)
    if points and find_reference(str(reference), root) is None:
        return f"{at}.$ref", f"there is no {reference}"
    for key in ("properties", "$defs", "definitions"):
        for name, part in (schema.get(key) or {}).items():
            if found := _contradiction(part, root, f"{at}.{key}.{name}"):
                return found
    for key in ("items", "prefixItems", "anyOf", "oneOf", "allOf"):
        if found := _contradiction(schema.get(key), root, f"{at}.{key}"):
            return found
    return None


def _example(schema: Any, root: Mapping[str, Any], inside: frozenset[str] = frozenset()) -> Any:
    """Return a small value of a schema; what it says beyond kinds and choices is not looked at.

    Args:
        schema: the schema.
        root: what references point into.
        inside: references that it is a part of: a schema may hold itself.
    """

    def inner(part: Any) -> Any:
        return _example(part, root, inside)

    if not isinstance(schema, Mapping):
        return ""
    if "$ref" in schema:
        reference = str(schema["$ref"])
        found = None if reference in inside else find_reference(reference, root)
        return _example(found, root, inside | {reference})
    if "const" in schema or "enum" in schema:
        return schema.get("const", (schema.get("enum") or [""])[0])
    for several in ("anyOf", "oneOf", "allOf"):
        if schema.get(several):
            return inner(schema[several][0])
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object" or "properties" in schema:
        return {k: inner(v) for k, v in schema.get("properties", {}).items()}
    if kind == "array":
        return [inner(schema.get("items", {}))] * int(schema.get("minItems", 0))
    return {"integer": 0, "number": 0.0, "boolean": False, "null": None}.get(str(kind), "")
