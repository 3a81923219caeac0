"""Applications from Python are those of app.yaml: the same sections, there and back."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

import samullm_plugin as sl
from samullm_plugin.app.loading import read_spec
from samullm_plugin.app.nodespec import NodeSection, PythonSection
from samullm_plugin.app.rowspec import RequestsSection
from samullm_plugin.app.spec import AppSpec

EXAMPLES = Path(__file__).parents[2] / "examples" / "applications"
FILES = sorted(EXAMPLES.glob("*/app.yaml"))
assert len(FILES) >= 9


def built(path: Path) -> sl.App:
    """Return the application of a file, made by the calls a Python program would write."""
    said: dict[str, Any] = yaml.safe_load(path.read_text())
    options = {n: v for n, v in said.items() if n not in ("version", "name", "nodes")}
    app = sl.App(said["name"], folder=path.parent, **options)
    made: dict[str, sl.Node] = {}
    for name, fields in said.get("nodes", {}).items():
        node = dict(fields)
        if isinstance(node.get("for_each"), str) and node["for_each"] in made:
            node["for_each"] = made[node["for_each"]]
        node["inputs"] = {
            label: made.get(v, v) if isinstance(v, str) else v
            for label, v in node.get("inputs", {}).items()
        } or None
        if "python" in node:
            made[name] = app.python(name, node.pop("python"), **node)
        else:
            made[name] = app.llm(name, **node)
    return app


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.parent.name)
def test_every_example_both_ways(path: Path, tmp_path: Path) -> None:
    spec = read_spec(path)
    app = built(path)
    assert app.spec == spec
    assert sl.App.from_yaml(path).spec == spec
    assert read_spec(app.to_yaml(tmp_path / "app.yaml")) == spec
    if "cluster" in spec.model_fields_set and not spec.applications:
        both = app.load(), sl.App.from_yaml(path).load()
        assert both[0].app.nodes[0].requests.prompt_tokens.tolist() == (
            both[1].app.nodes[0].requests.prompt_tokens.tolist()
        )


def test_calls_have_every_field() -> None:
    """Whatever app.yaml can say of a node is a parameter, and of the application as well."""
    table = set(inspect.signature(sl.App.llm).parameters)
    assert set(NodeSection.model_fields) <= table
    assert set(PythonSection.model_fields) - {"python"} <= set(
        inspect.signature(sl.App.python).parameters
    )
    assert {"id", "rename", "limit", "where"} <= set(RequestsSection.model_fields) & table
    assert set(AppSpec.model_fields) - {"version", "nodes"} <= set(
        inspect.signature(sl.App).parameters
    )


def keep_long(row: dict[str, Any]) -> bool:
    return len(row["output"]) > 3


def test_tables_and_functions_are_written_down(tmp_path: Path) -> None:
    rows = [{"q": "why?", "key": "a"}, {"q": "how?", "key": "b"}]
    app = sl.App("t", {"m": sl.Model("THUDM/chatglm3-6b", max_model_len=4096)})
    one = app.llm("one", model="m", data=rows, id="key", rename={"q": "prompt"}, max_tokens=8)
    app.llm("two", model="m", data=rows, id="key", rename={"q": "prompt"}, max_tokens=8)
    app.llm("three", model="m", for_each=one, inputs={"other": "two"}, max_tokens=8)
    again = sl.App.from_yaml(app.to_yaml(tmp_path / "t" / "app.yaml"))
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["app.yaml", "one.jsonl"]
    assert again.spec == app.spec
    for loaded in (app.load(), again.load()):
        assert loaded.sources is not None
        assert [s.ids for s in loaded.sources[:2]] == [("a", "b"), ("a", "b")]
        assert loaded.sources[2].fields[1]["prompt"] == "how?"


def test_functions_by_name(tmp_path: Path) -> None:
    from samullm_plugin.api.nodes import written

    (tmp_path / "steps.py").write_text("def f(row): return row\n")
    space: dict[str, Any] = {}
    source = (tmp_path / "steps.py").read_text()
    exec(compile(source, str(tmp_path / "steps.py"), "exec"), space)
    assert written(space["f"], tmp_path, "x") == "steps.py:f"
    assert written(yaml.safe_load, tmp_path, "x") == "yaml:safe_load"
    with pytest.raises(sl.InputError, match="no function or class of a module"):
        written(lambda row: row, tmp_path, "x")
    exec("def g(row): return row", space)
    with pytest.raises(sl.InputError, match=r"put it into (one|a file)"):
        written(space["g"], tmp_path, "x")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.llm("x", model="m", propmt="p"), "unexpected keyword argument 'propmt'"),
        (lambda a: a.llm("x", model="m", max_tokens=0), r"app\.llm\('x'\): sampling_params\.max"),
        (lambda a: a.llm("n", model="m", data="x"), "there is a node 'n' already"),
        (lambda a: a.llm("x", model="m", for_each=3), r"for_each: give a node, .* not a int"),
        (lambda a: a.llm("x", model="m", data=[], requests="y"), "give data or requests"),
        (lambda a: a.llm("x", model="m", requests="y", limit=3), "limit: there is no data"),
        (lambda a: a.llm("x", model="m", prompt="a", messages=[{"user": "b"}]), "prompt or mess"),
        (
            lambda a: a.llm("x", model="m", max_tokens=3, sampling_params={"max_tokens": 4}),
            "max_tokens is given twice",
        ),
        (lambda a: a.llm("x", model="m", data=object()) and a.load(), "cannot be read as a table"),
        (lambda a: a.llm("x", model="q", data=[{"prompt": "p"}]) and a.load(), "no model 'q'"),
        (lambda a: a.llm("x", model="m", for_each="nn") and a.load(), r"no node 'nn' \(did you"),
        (lambda a: sl.App("t", {"m": {"modle": "x"}}), r"App\('t'\)\.models\.m: .*modle: unknown"),
        (lambda a: sl.App("t", planner={"scheduler": int}), "does not derive from StageScheduler"),
        (lambda a: a.plan(gpus="two"), "gpus is 'two'; it must be a whole number"),
        (lambda a: a.python("p", None, data=[{"q": 1}]), "should be callable, not None"),
        (lambda a: a.plan(gpus=2, scheduler="greedi"), "did you mean 'greedy'"),
        (lambda a: sl.App("two words"), "use letters, digits"),
        (lambda a: sl.App.from_yaml("none/app.yaml"), "there is no such file"),
    ],
)
def test_wrong_calls(call: Any, message: str) -> None:
    app = sl.App("t", {"m": "THUDM/chatglm3-6b"})
    app.llm("n", model="m", data=[{"prompt": "p"}], max_tokens=8)
    with pytest.raises((sl.InputError, TypeError), match=message):
        call(app)
