"""Outputs that follow a schema need some tokens, whatever a model writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate

from samullm_plugin.app.schemas import Schema
from samullm_plugin.app.schemasamples import shortest_output, shortest_texts
from samullm_plugin.cli.app import main
from samullm_plugin.model.application import ModelSpec

SCORE = {
    "type": "object",
    "properties": {
        "score": {"type": "integer", "minimum": 10, "maximum": 99},
        "reason": {"type": "string", "minLength": 3},
        "why": {"type": "string"},
    },
    "required": ["score", "reason"],
}
NESTED = {
    "$defs": {"item": {"type": "object", "properties": {"n": {"const": 5}}, "required": ["n"]}},
    "type": "array",
    "items": {"$ref": "#/$defs/item"},
    "minItems": 2,
}


def shortest(schema: dict[str, Any]) -> str:
    return min(shortest_texts(Schema("json", json.dumps(schema))), key=len)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (SCORE, '{"score":10,"reason":"   "}'),
        (NESTED, '[{"n":5},{"n":5}]'),
        ({"enum": ["medium", "low"]}, '"low"'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, '""'),
        ({"type": ["object", "null"], "required": ["a"]}, "null"),
        ({"type": "integer", "maximum": -10}, "-10"),
        ({"allOf": [{"type": "object"}, {"type": "object", "required": ["b"]}]}, '{"b":0}'),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, "{}"),
    ],
)
def test_the_shortest_text_of_a_schema(schema: dict[str, Any], text: str) -> None:
    assert shortest(schema) == text
    if "allOf" not in schema:
        validate(json.loads(text), schema)


def test_a_schema_that_holds_itself_has_an_end() -> None:
    assert shortest({"$ref": "#"}) == "0"
    tree = {"type": "object", "properties": {"t": {"$ref": "#"}}, "required": ["t"]}
    assert shortest(tree).startswith('{"t":{"t":')


def test_tokens_are_counted_or_bounded_by_characters() -> None:
    model, schema = ModelSpec("m", 100), Schema("json", json.dumps(SCORE))
    assert shortest_output(schema, model, lambda _, text: 1 + len(text))[1] == 27
    assert shortest_output(schema, model, lambda _, text: None)[1] == 4  # of 8 characters each
    assert shortest_output(schema, model, None)[1] == 4
    choice = Schema("choice", '["much longer", "no"]')
    assert shortest_output(choice, model, lambda _, text: len(text)) == ("no", 2)
    assert shortest_output(Schema("regex", "[0-9]{200}"), model, None) == ("", 1)


def test_it_is_found_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p", "max_tokens": 2}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    app = {
        "version": 1,
        "name": "t",
        "models": {"m": {"model": "THUDM/chatglm3-6b", "max_model_len": 4096}},
        "nodes": {
            "rate": {
                "model": "m",
                "requests": "rows.jsonl",
                "output_schema": SCORE,
                "sampling_params": {"max_tokens": 40},
            }
        },
        "cluster": {"gpus": 1, "gpu": "A100-80GB"},
    }
    path = tmp_path / "app.yaml"
    path.write_text(json.dumps(app))
    for command in ("validate", "plan"):
        assert main([command, str(path)]) == 2
        err = capsys.readouterr().err
        assert "rows.jsonl line 2" in err
        assert (
            'max_tokens is 2, and the shortest output that follows output_schema, {"score"' in err
        )
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert main(["validate", str(path)]) == 0
    path.write_text(json.dumps(app).replace('"max_tokens": 40', '"max_tokens": 3'))
    capsys.readouterr()
    assert main(["validate", str(path)]) == 2
    assert "nodes.rate.sampling_params: max_tokens is 3" in capsys.readouterr().err


def test_a_schema_that_holds_itself_several_times_is_not_followed_to_its_end() -> None:
    """That took time which grew with every level, and never ended for four of itself."""
    names = [f"part{k}" for k in range(12)]
    whole = {"type": "object", "required": names}
    whole["properties"] = {name: {"$ref": "#/$defs/whole"} for name in names}
    schema = {"$ref": "#/$defs/whole", "$defs": {"whole": whole}}
    text = shortest_texts(Schema("json", json.dumps(schema)))[0]
    assert text == "{" + ",".join(f'"{name}":0' for name in names) + "}"
