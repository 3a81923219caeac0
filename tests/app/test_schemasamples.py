"""Outputs that are drawn follow their schemas, whatever these say."""

from __future__ import annotations

import json
import random
import re
from enum import StrEnum
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from samullm_plugin.app.schemas import Schema, json_schema
from samullm_plugin.app.schemasamples import pattern_sample, schema_sample


class Mood(StrEnum):
    GOOD = "good"
    BAD = "bad"


class Part(BaseModel):
    name: str = Field(min_length=3, max_length=12)
    weight: float = Field(gt=0, le=1)
    parts: list[Part] = []  # of itself, without end


class Review(BaseModel):
    score: int = Field(ge=1, le=10)
    even: int = Field(multiple_of=2, gt=4, lt=8)
    small: float = Field(ge=0.2, lt=0.25)
    mood: Mood
    kind: Literal["a", "b"]
    note: str | None = None
    tags: set[str] = Field(min_length=2, max_length=4)
    pair: tuple[int, str]
    counts: dict[str, int]
    code: str = Field(pattern=r"^[A-Z]{2}-\d{3}$")
    part: Part


SCHEMAS = {
    "pydantic": Review.model_json_schema(),
    "bounds below": {"type": "integer", "maximum": -5},
    "bounds above": {"type": "integer", "exclusiveMinimum": 3},
    "steps of a half": {"type": "number", "multipleOf": 0.5, "minimum": 1, "maximum": 2},
    "kinds": {"type": ["integer", "null"]},
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"const": 3}}, "required": ["b"]},
        ]
    },
    "one of": {"oneOf": [{"type": "boolean"}, {"enum": ["x", "y"]}]},
    "formats": {
        "type": "object",
        "properties": {f: {"type": "string", "format": f} for f in ("date", "uuid", "odd")},
    },
    "long enough": {"type": "string", "minLength": 60},
    "many": {"type": "array", "items": {"type": "integer"}, "minItems": 5, "uniqueItems": True},
    "not": {"type": "integer", "minimum": 0, "maximum": 9, "not": {"multipleOf": 3}},
    "unnamed": {"type": "object", "required": ["x"], "additionalProperties": {"type": "number"}},
    "itself": {
        "type": "object",
        "properties": {
            "left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "n": {"type": "number"},
        },
        "required": ["left", "n"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_json(name: str) -> None:
    """Always, differently, and the same for the same seed."""
    schema = json_schema(SCHEMAS[name], "s")
    texts = [schema_sample(schema, random.Random(seed)) for seed in range(60)]
    assert all(text is not None for text in texts)
    for text in texts:
        schema.parse(str(text))
    assert len(set(texts)) > 1
    assert texts == [schema_sample(schema, random.Random(seed)) for seed in range(60)]


def test_every_field_is_there() -> None:
    """Templates use those that a model may leave out as well."""
    schema = json_schema(Review.model_json_schema(), "s")
    for seed in range(20):
        value = json.loads(str(schema_sample(schema, random.Random(seed))))
        assert set(value) == set(Review.model_fields)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?P<label>yes|no): (?P<why>\w+)",
        r"[A-Z]{3}-\d{4}(\.\d+)?",
        r"Score:\s*[1-9]",
        r".+",
        r"(a|b)*c{2,}\S",
    ],
)
def test_patterns(pattern: str) -> None:
    schema = Schema("regex", pattern)
    texts = {schema_sample(schema, random.Random(seed)) for seed in range(30)}
    assert None not in texts
    assert len(texts) > 1
    for text in texts:
        assert re.fullmatch(pattern, str(text))
        assert str(text).isprintable()


def test_choices() -> None:
    schema = Schema("choice", '["red", "green"]')
    assert {schema_sample(schema, random.Random(k)) for k in range(20)} == {"red", "green"}


def test_what_cannot_be_drawn_is_none() -> None:
    nothing = json_schema({"type": "integer", "not": {"type": "integer"}}, "s")
    assert schema_sample(nothing, random.Random(0)) is None
    assert schema_sample(Schema("regex", r"a(?=b)c"), random.Random(0)) is None
    assert pattern_sample(r"(?(1)a|b)(", random.Random(0)) is None
