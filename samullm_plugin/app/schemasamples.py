"""Outputs that follow a schema, without a model: the shortest ones, and drawn ones for dry runs."""

from __future__ import annotations

import json
import math
import random
import string
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from samullm_plugin.app.requestlines import CHARACTERS_PER_TOKEN, TokenCounter
from samullm_plugin.app.schemas import Schema, find_reference
from samullm_plugin.errors import Reject
from samullm_plugin.model.application import ModelSpec

if TYPE_CHECKING:
    from rstr import Rstr

LONG_TOKENS = 2
"""How many times the usual characters a token may have where no tokenizer counts them."""

DEEPEST = 40
"""Levels of a schema that are followed; what is deeper counts as one character."""


def shortest_texts(schema: Schema) -> tuple[str, ...]:
    """Return texts of which one is no longer than any output that follows a schema.

    JSON is written without spaces, and with those that ``json.dumps`` leaves, as models do. What is
    said of values beyond kinds, limits, lengths and required fields is not looked at. Of a regular
    expression nothing is known.
    """
    if schema.kind == "regex":
        return ()
    found = json.loads(schema.text)
    if schema.kind == "choice":
        return tuple(found)
    return tuple(dict.fromkeys(_shortest(found, found, s) for s in ((",", ":"), (", ", ": "))))


def shortest_output(
    schema: Schema, model: ModelSpec, count_tokens: TokenCounter | None
) -> tuple[str, int]:
    """Return the shortest output that follows a schema, and the tokens that it has at least.

    Args:
        schema: the schema.
        model: whose tokenizer counts; without one a token counts as ``LONG_TOKENS`` usual ones.
        count_tokens: counts tokens where a tokenizer is at hand.

    Returns:
        An empty text and 1 where nothing is known.
    """
    most = LONG_TOKENS * CHARACTERS_PER_TOKEN
    found = [("", 1)]
    for k, text in enumerate(shortest_texts(schema)):
        tokens = None if count_tokens is None else count_tokens(model, text)
        if tokens is None or count_tokens is None:
            tokens = math.ceil(len(text) / most)
        else:
            tokens -= count_tokens(model, "") or 0  # such as one that begins a text
        if k == 0 or tokens < found[0][1]:
            found[0] = text, max(tokens, 1)
    return found[0]


def _shortest(
    schema: Any,
    root: Mapping[str, Any],
    separators: tuple[str, str],
    depth: int = 0,
    inside: frozenset[str] = frozenset(),
) -> str:
    """Return a text that is no longer than any value of a schema.

    Args:
        schema: the schema.
        root: what references point into.
        separators: between values, and behind names.
        depth: levels above it.
        inside: references that it is a part of. One that comes again counts as one character:
            following each to the end takes time that grows with every level.
    """
    if not isinstance(schema, Mapping) or depth > DEEPEST:
        return "0"
    reference = str(schema.get("$ref", ""))
    if reference in inside:
        return "0"
    inside |= {reference} - {""}

    def inner(part: Any) -> str:
        return _shortest(part, root, separators, depth + 1, inside)

    bounds = []
    if reference:
        bounds.append(inner(find_reference(reference, root)))
    if "const" in schema:
        bounds.append(json.dumps(schema["const"], separators=separators))
    elif schema.get("enum"):
        bounds.append(_least([json.dumps(v, separators=separators) for v in schema["enum"]]))
    for several in ("anyOf", "oneOf"):
        if schema.get(several):
            bounds.append(_least([inner(part) for part in schema[several]]))
    bounds += [inner(part) for part in schema.get("allOf", ())]
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds:
        bounds.append(_least([_of_kind(str(kind), schema, separators, inner) for kind in kinds]))
    return max(bounds, key=len, default="0")


def _of_kind(kind: str, schema: Mapping[str, Any], separators: tuple[str, str], inner: Any) -> str:
    """Return a text that is no longer than any value of a kind."""
    between, behind = separators
    if kind == "object":
        parts = schema.get("properties", {})
        names = dict.fromkeys(schema.get("required", ()))
        fields = [f"{json.dumps(n)}{behind}{inner(parts.get(n, {}))}" for n in names]
        return "{" + between.join(fields) + "}"
    if kind == "array":
        least = int(schema.get("minItems", 0))
        first = list(schema.get("prefixItems", ()))[:least]
        items = [inner(part) for part in first]
        items += [inner(schema.get("items", {}))] * (least - len(first))
        return "[" + between.join(items) + "]"
    if kind == "string":
        return '"' + " " * int(schema.get("minLength", 0)) + '"'  # spaces make the fewest tokens
    if kind == "integer":
        least, most = schema.get("minimum", 0), schema.get("maximum", 0)
        return str(math.ceil(least) if least > 0 else math.floor(most) if most < 0 else 0)
    return {"boolean": "true", "null": "null"}.get(kind, "0")


def _least(texts: Sequence[str]) -> str:
    return min(texts, key=len)


_DRAWS = 20
"""So often another value is drawn if one does not follow all that the schema says."""
_DEEP = 4
"""Levels below which only what must be there is."""
_WIDE = 100
"""How far numbers without a bound go."""
_WORDS = (
    "amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "harbor", "inlet", "juniper",
    "kernel", "lantern", "meadow", "nectar", "orchard", "pebble", "quartz", "ridge", "summit",
)  # fmt: skip


def schema_sample(schema: Schema, rng: random.Random) -> str | None:
    """Return an output that follows a schema; None if none was found.

    Args:
        schema: any schema. What it says beyond kinds, choices, bounds, lengths and patterns is kept
            by drawing again.
        rng: decides.
    """
    for _ in range(_DRAWS):
        if schema.kind == "choice":
            found: str | None = rng.choice(json.loads(schema.text))
        elif schema.kind == "regex":
            found = pattern_sample(schema.text, rng)
        else:
            root = json.loads(schema.text)
            found = json.dumps(_drawn(root, root, rng, 0), ensure_ascii=False)
        if found is not None and _follows(schema, found):
            return found
    return None


def pattern_sample(pattern: str, rng: random.Random) -> str | None:
    """Return a text that a regular expression describes; None if nobody knows how to make one.

    Args:
        pattern: the regular expression. The text may not match where it looks ahead or back.
        rng: decides.
    """
    texts = _texts(rng)
    try:
        return min((texts.xeger(pattern) for _ in range(3)), key=len)
    except Exception:  # what its parts cannot be drawn of ends in errors of many kinds
        return None


def _texts(rng: random.Random) -> Rstr:
    from rstr import Rstr

    readable = string.ascii_letters + string.digits + " "
    return Rstr(rng, printable=readable, whitespace=" ", nonwhitespace=readable[:-1])


def _follows(schema: Schema, text: str) -> bool:
    try:
        schema.parse(text)
    except Reject:
        return False
    return True


def _drawn(schema: Any, root: Mapping[str, Any], rng: random.Random, level: int) -> Any:
    """Return a value of a JSON schema."""
    schema = _simple(schema, root, rng, level)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return rng.choice(schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = rng.choice(kind)
    if kind == "object" or (kind is None and "properties" in schema):
        return _object(schema, root, rng, level)
    if kind == "array":
        return _array(schema, root, rng, level)
    if kind in ("integer", "number"):
        return _number(schema, rng, whole=kind == "integer")
    if kind == "boolean":
        return rng.random() < 0.5
    return None if kind == "null" else _text(schema, rng)


def _simple(
    schema: Any, root: Mapping[str, Any], rng: random.Random, level: int
) -> Mapping[str, Any]:
    """Return a schema without references, and with one of its alternatives."""
    found: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
    for _ in range(2 * _DEEP):
        rest = {k: v for k, v in found.items() if k not in ("$ref", "anyOf", "oneOf", "allOf")}
        more: list[Any] = []
        if "$ref" in found:
            more.append(find_reference(str(found["$ref"]), root))
        for name in ("anyOf", "oneOf"):
            if several := found.get(name):
                plain = [s for s in several if not _nests(s)]
                more.append(rng.choice(plain if plain and level >= _DEEP else several))
        more += found.get("allOf", ())
        if not more:
            break
        found = _both([*(m for m in more if isinstance(m, Mapping)), rest])
    return found


def _both(schemas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what several schemas say together."""
    found: dict[str, Any] = {}
    for schema in schemas:
        for name, said in schema.items():
            if name == "properties":
                found[name] = {**found.get(name, {}), **said}
            elif name == "required":
                found[name] = [*found.get(name, ()), *said]
            else:
                found[name] = said
    return found


def _nests(schema: Any) -> bool:
    """Return whether values of a schema may hold others."""
    return isinstance(schema, Mapping) and (
        "$ref" in schema or schema.get("type") in ("object", "array")
    )


def _object(
    schema: Mapping[str, Any], root: Mapping[str, Any], rng: random.Random, level: int
) -> dict[str, Any]:
    known: Mapping[str, Any] = schema.get("properties", {})
    required = set(schema.get("required", ()))
    names = [n for n in known if n in required or level < _DEEP]
    found = {n: _drawn(known[n], root, rng, level + 1) for n in names}
    others = schema.get("additionalProperties", {})
    for name in sorted(required - set(found)):
        found[name] = _drawn(others, root, rng, level + 1)
    least = schema.get("minProperties", 0 if known or level >= _DEEP or others is False else 1)
    for k in range(least - len(found)):
        found[f"{_WORDS[k % len(_WORDS)]}{k // len(_WORDS) or ''}"] = _drawn(
            others, root, rng, level + 1
        )
    return found


def _array(
    schema: Mapping[str, Any], root: Mapping[str, Any], rng: random.Random, level: int
) -> list[Any]:
    least = int(schema.get("minItems", 0))
    most = int(schema.get("maxItems", max(3, least)))
    heads, items = schema.get("prefixItems", ()), schema.get("items", {})
    if items is False:
        most = min(most, len(heads))
    low, high = max(least, min(1, most)), max(least, min(most, least + 2))
    count = least if level >= _DEEP else max(rng.randint(low, max(low, high)), len(heads[:most]))
    found: list[Any] = []
    for k in range(count):
        part = heads[k] if k < len(heads) else items
        value = _drawn(part, root, rng, level + 1)
        for _ in range(_DRAWS if schema.get("uniqueItems") and value in found else 0):
            value = _drawn(part, root, rng, level + 1)
            if value not in found:
                break
        if not (schema.get("uniqueItems") and value in found and k >= least):
            found.append(value)
    return found


def _number(schema: Mapping[str, Any], rng: random.Random, *, whole: bool) -> float:
    step = schema.get("multipleOf", 1 if whole else None)
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    open_low, open_high = low is None or above is not None, high is None or below is not None
    low, high = above if above is not None else low, below if below is not None else high
    if low is None:
        low = min(0, high - _WIDE) if high is not None else 0
        open_low = False
    if high is None:
        high, open_high = max(low, 0) + _WIDE, False
    if step:
        first, last = -(-low // step), high // step
        first += open_low and first * step == low
        last -= open_high and last * step == high
        found = rng.randint(int(first), max(int(first), int(last))) * step
        return int(found) if whole else found
    return float(round(rng.uniform(low, high), 3)) if high - low >= 1 else rng.uniform(low, high)


def _text(schema: Mapping[str, Any], rng: random.Random) -> str:
    if "pattern" in schema:
        return pattern_sample(schema["pattern"], rng) or ""
    made = _of_format(str(schema.get("format", "")), rng)
    if made is not None:
        return made
    least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
    text = " ".join(rng.sample(_WORDS, 3))
    while len(text) < least:
        text = f"{text} {rng.choice(_WORDS)}"
    return text if most is None else text[: max(int(most), least)]


def _of_format(name: str, rng: random.Random) -> str | None:
    """Return a text of a format that JSON schemas know; None if they do not."""
    day = f"20{rng.randint(10, 30)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}"
    word = rng.choice(_WORDS)
    formats = {
        "date": day,
        "time": f"{clock}Z",
        "date-time": f"{day}T{clock}Z",
        "duration": f"PT{rng.randint(1, 59)}M",
        "email": f"{word}@example.com",
        "hostname": f"{word}.example.com",
        "uri": f"https://example.com/{word}",
        "ipv4": f"192.0.2.{rng.randint(1, 254)}",
        "uuid": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }
    return formats.get(name)
