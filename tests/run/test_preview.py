"""``samullm preview`` and simulated texts: what the models will be asked, before they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import samullm_plugin as sl
from samullm_plugin.cli.app import main
from tests.models import make_tiny_llama
from tests.run.test_reuse import application

EXAMPLES = Path(__file__).parents[2] / "examples" / "applications"


def test_filters_and_joins(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(EXAMPLES / "filter-vote" / "app.yaml")
    assert main(["preview", path, "--rows", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["node"] for r in rows].count("vote") == 2
    by_node = {r["node"]: r for r in rows if r["item"] == "2"}
    assert by_node["answer.wizard"]["only_if"] == ["filter"]
    assert by_node["answer.wizard"]["waits_for"] == ["filter:2"]
    assert "(2) ⟨output of answer.wizard⟩" in by_node["vote"]["prompt"]
    assert by_node["vote"]["sampling"]["max_tokens"] == 200
    assert not by_node["vote"]["exact"]
    assert main(["preview", path, "--node", "vote", "--rows", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("──") == 1
    assert "prompt tokens (estimated: no tokenizer here)" in shown.out
    assert "vote: 1 asked" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--node", "vot"], "--node: there is no node 'vot' (did you mean 'vote'?)"),
        (["--executor", "vllm2"], "--output-dir and --executor go with --run"),
    ],
)
def test_wrong_input(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["preview", str(EXAMPLES / "filter-vote" / "app.yaml"), *words]) == 2
    assert message in capsys.readouterr().err
    assert main(["preview", "routing", *words[:0]]) == 2
    assert "has no texts to preview" in capsys.readouterr().err


def test_simulated_runs_carry_ids_and_texts(tmp_path: Path) -> None:
    app = sl.App.from_yaml(EXAMPLES / "filter-vote" / "app.yaml")
    run = app.run(app.plan(scheduler="max-heuristic", limit=3), tmp_path / "run")
    table = run.table(["id", "filter", "vote"]).head(3)
    assert [r["id"] for r in table] == ["1", "2", "3"]
    for row in table:  # what stands for an output leads where the row went
        assert row["filter"].startswith("⟨") or re.search("(?i)yes", row["filter"])
        assert (row["vote"] is None) == row["filter"].startswith("⟨")
        assert row["vote"] is None or "of vote for" in row["vote"]
    lines = (tmp_path / "run/outputs/filter.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["custom_id"] == "1"


@pytest.mark.vllm
def test_real_answers_to_a_few_rows(tmp_path: Path) -> None:
    """Exact counts, and real outputs in the next prompt; a later run asks only the other rows."""
    app = application(tmp_path)
    shown = app.preview(rows=2)
    assert all(r.exact for r in shown)
    assert shown[0].prompt_tokens == 3
    found = app.answered(2)
    assert [r.node for r in found] == ["answer", "answer", "judge", "judge"]
    assert found[0].output
    assert found[2].prompt == f"w7 {found[0].output}"
    plan = app.plan()
    assert plan.known is not None
    assert plan.known.counts == {"answer": 2, "judge": 2}


def test_functions_and_lists_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Functions are called; a list shows the elements it has, and what waits for no others."""
    path = str(EXAMPLES / "extraction" / "app.yaml")
    assert main(["preview", path, "--rows", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["node"], r["id"]) for r in rows] == [
        ("pieces", "a/1"), ("pieces", "a/2"), ("extract", "a/1"), ("extract", "a/2"), ("page", "a"),
    ]  # fmt: skip
    assert json.loads(rows[0]["output"])["text"] in rows[2]["messages"][-1]["content"]
    assert {r["status"] for r in rows} == {"asked"}
    assert rows[4]["waits_for"] == ["extract:a/1", "extract:a/2"]
    assert main(["preview", path, "--rows", "1", "--node", "page"]) == 0
    assert '{"people":' in capsys.readouterr().out


def test_what_a_filter_lets_pass_is_asked_in_any_case(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = EXAMPLES / "cascade" / "app.yaml"
    assert main(["preview", str(path), "--rows", "1", "--json"]) == 0
    rows = {r["node"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows["large"]["only_if"] == ["small"]
    assert rows["explain"]["only_if"] == []
    table = sl.App.from_yaml(path).load().app
    assert table.nodes[table.index("explain")].requests.probability.tolist() == [1.0] * 4
    assert table.nodes[table.index("large")].requests.probability.tolist() == [0.4] * 4


def test_counts_are_exact_by_the_tokenizer_and_template_that_the_engine_takes_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_llama(tmp_path / "spoken", tokenizer=True)
    make_tiny_llama(tmp_path / "bare")
    (tmp_path / "r.jsonl").write_text('{"prompt": "w7 w8"}\n')
    (tmp_path / "app.yaml").write_text(
        "version: 1\nname: a\n"
        "models:\n"
        f"  m: {{model: bare, path: bare, engine_args: {{tokenizer: {tmp_path}/spoken}}}}\n"
        "  r: {model: spoken, path: spoken, engine_args: {convert: classify}}\n"
        "nodes:\n"
        "  answer: {model: m, requests: r.jsonl, chat: true, sampling_params: {max_tokens: 4},\n"
        "    chat_template: '{% for m in messages %}{{ m.content }} w9 w10 w11{% endfor %}'}\n"
        "  rank: {model: r, task: score, requests: r.jsonl, pair: w5}\n"
        "cluster: {gpus: 1}\n"
    )
    assert main(["preview", str(tmp_path / "app.yaml"), "--json"]) == 0
    answer, rank = json.loads(capsys.readouterr().out)
    assert (answer["prompt_tokens"], answer["exact"]) == (5, True)
    assert not rank["exact"]  # how two texts are put together is the engine's business


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fresh", "filtr"], "--fresh: there is no node 'filtr' (did you mean 'filter'?)"),
        (["--reuse", "nowhere"], "--reuse nowhere: holds no run"),
    ],
)
def test_wrong_reuse_is_told_of_simulated_runs_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """Nothing is used again there; a wrong name is wrong all the same."""
    app = str(EXAMPLES / "filter-vote" / "app.yaml")
    assert main(["run", app, "--output-dir", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
