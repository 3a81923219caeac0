"""The least that an output must be to follow its schema: found before a model is asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from samullm_plugin.app.requestlines import CHARACTERS_PER_TOKEN, TokenCounter
from samullm_plugin.app.schemas import Schema, find_reference
from samullm_plugin.model.application import ModelSpec

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
