"""What outputs are that do not follow their schema, whatever a model writes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from samullm_plugin.app.schemas import Schema, find_reference, json_schema, regex_schema
from samullm_plugin.errors import InputError, Reject

ANYTHING = Schema("json", "{}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"a": ', "is not JSON"),
        ("[" * 2000, "is not JSON"),
        ("[" * 100_000 + "]" * 100_000, "is not JSON: maximum recursion depth"),
        ("[" * 300 + "]" * 300, "more than 100 levels"),
        ("1" * 5000, "is not JSON: Exceeds the limit"),
    ],
    ids=["nothing", "cut", "repeated", "too deep to read", "deep", "too many digits"],
)
def test_what_cannot_be_kept_is_rejected(text: str, message: str) -> None:
    with pytest.raises(Reject, match=message):
        ANYTHING.parse(text)


def test_what_can_be_kept_is_the_value() -> None:
    assert ANYTHING.parse("[" * 100 + "1" + "]" * 100)
    assert ANYTHING.parse('{"a": "\\ud800"}') == {"a": "\ud800"}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "enum": []}, "s.enum: .*no values to choose from"),
        ({"minLength": 5, "maxLength": 2}, "s: .*minLength 5 is above maxLength 2"),
        (
            {"type": "object", "properties": {"n": {"minimum": 9, "maximum": 1}}},
            "s.properties.n: .*minimum 9 is above maximum 1",
        ),
        ({"items": {"$ref": "#/$defs/gone"}}, r"s.items.\$ref: .*no #/\$defs/gone"),
        (
            {"type": "object", "properties": {"a": False}, "required": ["a"]},
            "s.properties.a: .*a required field is false",
        ),
        ({"anyOf": [{"type": "null"}, {"enum": []}]}, "s.anyOf.1.enum: .*no values"),
    ],
)
def test_a_schema_that_nothing_follows_is_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        json_schema(schema, "s")


def test_references_and_narrow_limits_are_fine() -> None:
    item = {"type": "integer", "minimum": 3, "maximum": 3}
    schema = {"$defs": {"a/b": item}, "type": "array", "items": {"$ref": "#/$defs/a~1b"}}
    assert json_schema(schema, "s").example() is not None
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    assert json_schema(tree, "s").kind == "json"


def test_schemas_that_hold_themselves_have_an_example() -> None:
    """As those of trees and linked lists, which pydantic writes so."""
    tree: dict[str, Any] = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"$ref": "#"}},
    }
    assert json_schema(tree, "here").example() == {
        "value": 0,
        "next": {"value": 0, "next": ""},
    }


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("#/$defs/a~1b", {"type": "null"}),
        ("#/anyOf/0", {"type": "string"}),
        ("#/anyOf/1", None),
        ("#/$defs/ab", None),
        ("#anchor", None),
    ],
)
def test_references_are_json_pointers(reference: str, found: object) -> None:
    root = {"$defs": {"a/b": {"type": "null"}}, "anyOf": [{"type": "string"}]}
    assert find_reference(reference, root) == found
    assert find_reference("#", root) is root


def test_named_groups_are_for_the_value_and_not_for_the_engine() -> None:
    schema = regex_schema(r"(?P<year>19[0-9]{2})\(?P<[(?P<z>]", "here")
    assert schema.structured_outputs == {"regex": r"(19[0-9]{2})\(?P<[(?P<z>]"}
    assert schema.parse("1942P<z") == {"year": "1942"}


@pytest.mark.parametrize("pattern", [r"(a)\1", "a(?=b)", "(?<!a)b", r"\bx", "(?P<a>x)(?P=a)"])
def test_what_no_engine_can_generate_by_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="here: no engine can generate by it"):
        regex_schema(pattern, "here")


class Inner(BaseModel):
    """An object that may be empty."""

    a: int = 3
    b: list[str] = ["q"]


class Outer(BaseModel):
    """One that holds others, and perhaps one of its own kind."""

    one: Inner | None = None
    many: list[Inner]
    next: Outer | None = None


def test_fields_with_a_default_may_be_left_out_of_an_output() -> None:
    schema = json_schema(Outer.model_json_schema(), "here")
    text = '{"many": [{"a": 1}, {}], "one": {"b": []}, "next": {"many": []}}'
    assert schema.parse(text) == Outer.model_validate_json(text).model_dump()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "allOf": [{"$ref": "#"}]},
        {"$ref": "#/$defs/A", "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}]}}},
        {
            "items": {"$ref": "#/$defs/A"},
            "type": "array",
            "$defs": {"A": {"not": {"$ref": "#/$defs/B"}}, "B": {"oneOf": [{"$ref": "#/$defs/A"}]}},
        },
    ],
)
def test_a_schema_that_says_nothing_but_itself_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"f: #.* refers to itself without going into a field"):
        json_schema(schema, "f")


def test_a_tree_may_hold_trees_and_its_defaults_are_filled_in() -> None:
    tree = {
        "type": "object",
        "properties": {
            "v": {"type": "integer", "default": 3},
            "kids": {"type": "array", "items": {"$ref": "#/$defs/T"}},
        },
    }
    made = json_schema({"$ref": "#/$defs/T", "$defs": {"T": tree}}, "f")
    assert made.value('{"kids": [{}]}') == {"kids": [{"v": 3}], "v": 3}
