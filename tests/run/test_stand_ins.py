"""A simulated run can be followed from end to end: outputs lead to what became of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq
import pytest

import samullm_plugin as sl
from samullm_plugin.api.runs import AppRun

APP = r"""
version: 1
name: dry
models: {m: {model: THUDM/chatglm3-6b}}
nodes:
  generate:
    model: m
    requests: q.jsonl
    prompt: "{{ instruction }}"
    sampling_params: {max_tokens: 64}
  rate:
    model: m
    for_each: generate
    prompt: "Rate: {{ generate }}"
    output_schema:
      type: object
      properties: {score: {type: integer, minimum: 1, maximum: 10}, reason: {type: string}}
      required: [score, reason]
    sampling_params: {max_tokens: 40}
    keep: {expr: "score < 7", probability: 0.4}
  improve:
    model: m
    for_each: rate
    prompt: "Improve {{ generate }}, rated {{ rate.score }}: {{ rate.reason }}"
    sampling_params: {max_tokens: 64}
  sort:
    model: m
    requests: q.jsonl
    prompt: "code or math? {{ instruction }}"
    sampling_params: {max_tokens: 4}
    route:
      code: {when: '\bcode\b', probability: 0.3}
      math: {when: "math|algebra", probability: 0.3}
      talk: {}
  code: {model: m, prompt: "Code: {{ instruction }}", sampling_params: {max_tokens: 64}}
  math: {model: m, prompt: "Math: {{ instruction }}", sampling_params: {max_tokens: 64}}
  talk: {model: m, prompt: "Talk: {{ instruction }}", sampling_params: {max_tokens: 64}}
  label:
    model: m
    requests: q.jsonl
    output_schema: {regex: "(?P<first>yes|no), (?P<second>[a-c])"}
    prompt: "{{ instruction }}"
    sampling_params: {max_tokens: 8}
    route: {sure: {expr: "first == 'yes'", probability: 0.5}, unsure: {}}
  sure: {model: m, prompt: "Sure: {{ label.second }}", sampling_params: {max_tokens: 8}}
  unsure: {model: m, prompt: "Unsure: {{ label.second }}", sampling_params: {max_tokens: 8}}
  checked:
    model: m
    for_each: improve
    prompt: "{{ improve }}"
    sample: {grade: A}
    sampling_params: {max_tokens: 8}
  best: {python: "functions.py:best", for_each: checked, sample: {winner: 3}}
  report: {model: m, for_each: best, prompt: "{{ best.winner }}", sampling_params: {max_tokens: 8}}
output:
  file: result.parquet
  columns: [id, rate, rate.score, rate.text, improve, sort, code, math, talk, label.first, sure,
            unsure, checked.grade, best.winner, report]
cluster: {gpus: 4, gpu: A100-80GB}
executor: simulated
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> AppRun:
    folder = tmp_path_factory.mktemp("dry")
    lines = (json.dumps({"id": f"q{k}", "instruction": f"Say {k}."}) for k in range(60))
    (folder / "q.jsonl").write_text("\n".join(lines))
    (folder / "functions.py").write_text("def best(row):\n    raise AssertionError('not called')\n")
    (folder / "app.yaml").write_text(APP)
    app = sl.App.from_yaml(folder / "app.yaml")
    return app.run(app.plan(scheduler="min-heuristic"), output_dir=folder / "run")


def taken(row: Mapping[str, Any], *columns: str) -> list[str]:
    return [c for c in columns if row[c] is not None]


def test_outputs_lead_where_the_rows_went(run: AppRun) -> None:
    rows = pq.read_table(run.directory / "result.parquet").to_pylist()
    assert len(rows) == 60
    for row in rows:
        assert row["rate"] == json.loads(row["rate.text"])
        assert row["rate"]["score"] == row["rate.score"]
        assert (row["improve"] is not None) == (row["rate.score"] < 7)
        code = re.search(r"\bcode\b", row["sort"])
        expected = "code" if code else "math" if re.search("math|algebra", row["sort"]) else "talk"
        assert taken(row, "code", "math", "talk") == [expected]
        sure = row["label.first"] == "yes"
        assert taken(row, "sure", "unsure") == ["sure" if sure else "unsure"]
        improved = row["improve"] is not None
        assert (row["checked.grade"], row["best.winner"]) == (
            ("A", 3) if improved else (None, None)
        )
        assert (row["report"] is not None) == improved
    assert len({r["rate.score"] for r in rows}) > 4
    assert {c for r in rows for c in taken(r, "code", "math", "talk")} == {"code", "math", "talk"}


def test_prompts_have_them_in_their_places(run: AppRun) -> None:
    shown = json.loads((run.directory / "rows/samples.json").read_text())
    found = {r["node"]: r for item in shown for r in item["requests"] if r["status"] == "finished"}
    value = json.loads(
        next(
            r["output"]
            for item in shown
            for r in item["requests"]
            if (r["node"], r["id"]) == ("rate", found["improve"]["id"])
        )
    )
    prompt = found["improve"]["prompt"]
    assert prompt.endswith(f"rated {value['score']}: {value['reason']}")
    assert found["report"]["prompt"] == "3"


def test_values_of_schemas_are_read_from_texts(run: AppRun) -> None:
    """The journal does not hold them twice, and columns show them all the same."""
    records = (run.directory / "events.jsonl").read_text().splitlines()
    rated = [r for r in map(json.loads, records) if r.get("node") == "rate" and "text" in r]
    assert len(rated) == 60
    assert not any("value" in r for r in rated)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("rate.scor", r"'rate\.scor': outputs of rate have no field 'scor' \(did you mean 'score'"),
        ("rate.grade", r"have no field 'grade'; there are reason, score"),
        ("label.third", r"outputs of label have no field 'third'"),
    ],
)
def test_fields_that_outputs_cannot_have(run: AppRun, column: str, message: str) -> None:
    """A column of nulls only is nobody's wish: it is refused before a run, and after it."""
    with pytest.raises(sl.InputError, match=message):
        run.table(["id", column]).to_arrow()
    path = run.directory.parent / "wrong.yaml"
    path.write_text(APP.replace("rate.score,", f"{column},"))
    app = sl.App.from_yaml(path)
    with pytest.raises(sl.InputError, match=message):
        app.run(app.plan(scheduler="max-heuristic"), output_dir=run.directory.parent / "wrong")
    assert not (run.directory.parent / "wrong").exists()
    figures = run.table(["rate.text", "rate.completion_tokens", "checked.any"]).head(1)[0]
    assert figures["rate.completion_tokens"] > 0
