"""The joined table: rows from a run's directory, in parts, in every format."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import samullm_plugin as sl
from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import load_application
from samullm_plugin.cli.app import main
from samullm_plugin.errors import InputError, RunError
from samullm_plugin.run import rows as rows_module
from samullm_plugin.run import table_files
from samullm_plugin.run.joined import JoinedTable, column_of
from samullm_plugin.run.rows import RunRows, write_layout
from samullm_plugin.run.table_files import TableParts, check_output, export_table

APP = """
version: 1
name: judged
models: {a: {model: THUDM/chatglm3-6b}, b: {model: lmsys/vicuna-13b-v1.5}}
nodes:
  generate:
    model: [a, b]
    requests: q.jsonl
    sampling_params: {max_tokens: 50}
  rate:
    model: a
    for_each: generate
    prompt: "{{ prompt }} {{ output }}"
    sampling_params: {max_tokens: 50}
  sum:
    model: b
    inputs: {ratings: rate}
    prompt: "{{ ratings }}"
    sampling_params: {max_tokens: 50}
cluster: {gpus: 4}
"""


def application(folder: Path, count: int = 5, output: str = "") -> LoadedApplication:
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"id": f"q{k}", "prompt": f"question {k}", "level": k, "tags": ["x"] * (k % 3)})
        for k in range(count)
    ]
    (folder / "q.jsonl").write_text("\n".join(lines))
    (folder / "app.yaml").write_text(APP + output)
    return load_application(folder / "app.yaml")


def journal(
    folder: Path, loaded: LoadedApplication, skip: tuple[tuple[str, int], ...] = ()
) -> None:
    """Write a journal in which everything was answered, in a mixed order."""
    (folder / "run.json").write_text("{}")
    records: list[dict[str, Any]] = [{"time_s": 0.0, "kind": "plan", "plan": {}}]
    for node in loaded.app.nodes:
        for r in range(len(node.requests)):
            made: dict[str, Any] = {"time_s": 1.0, "kind": "finished", "node": node.name}
            made |= {"request": r, "num_tokens": r, "text": f"{node.name}:{r}"}
            if node.name == "rate" and r == 3:
                made = {**made, "kind": "failed", "error": "too long"}
            if node.name == "rate":
                made["value"] = {"score": r, "why": {"short": f"w{r}"}}
            if (node.name, r) not in skip:
                records.append(made)
    order = np.random.default_rng(0).permutation(len(records))
    text = "".join(json.dumps(records[k]) + "\n" for k in order)
    (folder / "events.jsonl").write_text(text + '{"time_s": 9, "kind": "fi')  # torn by a crash


@pytest.fixture
def run(tmp_path: Path) -> Path:
    loaded = application(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    write_layout(folder, loaded)
    journal(folder, loaded)
    return folder


def test_everything_by_item(run: Path) -> None:
    export_table(run, run / "t.parquet", "parquet")
    table = pq.read_table(run / "t.parquet")
    assert table.column_names[:4] == ["id", "prompt", "level", "tags"]
    rows = table.to_pylist()
    assert [r["id"] for r in rows] == [f"q{k}" for k in range(5)]
    assert rows[2]["generate.a"] == "generate.a:2"
    assert rows[2]["tags"] == ["x", "x"]
    assert [v["score"] for v in rows[2]["rate"]] == [2, 7]  # two answers of the item were rated
    assert rows[3]["rate"][0] is None
    assert rows[3]["rate.error"] == "too long"
    assert rows[2]["rate.error"] is None
    assert not list(run.glob(".t.parquet*"))


def test_columns_and_rows_of_a_node(run: Path) -> None:
    columns = ["id", "input.level", "generate", "rate.score", "rate.why.short", "rate.error", "sum"]
    export_table(run, run / "t.jsonl", "jsonl", columns, "rate")
    rows = [json.loads(line) for line in (run / "t.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert rows[7] == {
        "id": "generate.b:q2",
        "input.level": 2,
        "generate.a": "generate.a:2",
        "generate.b": "generate.b:2",
        "rate.score": 7,
        "rate.why.short": "w7",
        "rate.error": None,
        "sum": "sum:2",
    }


def test_a_run_that_goes_on_is_written_in_parts(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "PART_ROWS", 2)
    whole = (run / "events.jsonl").read_text().splitlines(keepends=True)
    rows = RunRows(run)
    parts = TableParts(JoinedTable(rows), run / "parts")
    loaded = load_application(tmp_path / "app.yaml")
    journal(run, loaded, skip=(("sum", 3),))
    parts.advance()
    assert sorted(p.name for p in (run / "parts").iterdir()) == [
        "part-00000.parquet",
        "part-00002.parquet",
    ]
    last = next(x for x in whole if '"sum"' in x and '"request": 3' in x)
    with (run / "events.jsonl").open("a") as file:
        file.write('nis"}\n' + last[:40])
        file.flush()
        parts.advance()
        assert len(list((run / "parts").iterdir())) == 2  # half a line says nothing
        file.write(last[40:])
    parts.advance()
    assert len(list((run / "parts").iterdir())) == 3
    parts.finish(run / "live.parquet", "parquet")
    rows.close()
    export_table(run, run / "later.parquet", "parquet")
    assert pq.read_table(run / "live.parquet").equals(pq.read_table(run / "later.parquet"))


def test_a_run_in_the_middle_has_nulls(tmp_path: Path, run: Path) -> None:
    journal(run, load_application(tmp_path / "app.yaml"), skip=(("sum", 0), ("sum", 1)))
    export_table(run, run / "t.csv", "csv", ["id", "sum", "rate.score"])
    table = pyarrow.csv.read_csv(run / "t.csv")
    assert table["sum"].to_pylist()[:3] == ["", "", "sum:2"]
    assert table["rate.score"].to_pylist()[2] == "[2,7]"


def test_columns_of_changing_types_become_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "PART_ROWS", 2)
    (tmp_path / "run").mkdir()
    loaded = application(tmp_path)
    values = [1, 2.5, "three", {"four": 4}, None]
    lines = [
        json.dumps({"id": f"q{k}", "prompt": "p", "v": v, "w": k if k < 2 else k / 2})
        for k, v in enumerate(values)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    loaded = load_application(tmp_path / "app.yaml")
    write_layout(tmp_path / "run", loaded)
    journal(tmp_path / "run", loaded)
    export_table(tmp_path / "run", tmp_path / "t.parquet", "parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["v"].to_pylist() == ["1.0", "2.5", "three", '{"four":4}', None]
    assert table["w"].to_pylist() == [0, 1, 1, 1.5, 2]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([{}, {}], ["{}", "{}"]),
        ([[{}], {"a": 1}], ["[{}]", '{"a":1}']),
        ([{"a": [{}]}], ['{"a":[{}]}']),
        (["\ud800", None], ["\\ud800", None]),
        ([{"a": "\ud800"}, 1], ['{"a": "\\ud800"}', "1"]),
        ([2**70, 1.5], ["1180591620717411303424", "1.5"]),
    ],
)
def test_values_that_no_column_type_holds_are_texts(
    tmp_path: Path, values: list[Any], texts: list[str | None]
) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pyarrow.table({"x": column_of(values)}), path)
    assert pq.read_table(path)["x"].to_pylist() == texts


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("{file: r.xlsx}", r"app\.yaml: r\.xlsx: the table's format '\.xlsx' is none of parquet"),
        ("{file: ../r.csv}", r"output\.file: '\.\./r\.csv' leads out of the run's directory"),
        ("{file: r.csv, columns: [rat]}", r"output\.columns: there is no 'rat' .*'rate'"),
        ("{file: r.csv, columns: [id, id]}", r"output\.columns: 'id' is there twice"),
        ("{file: r.csv, rows: generat}", r"output\.rows: there is no node 'generat'"),
        ("{fil: r.csv}", r"output\.fil: unknown field .*'file'"),
    ],
)
def test_a_wrong_output_is_refused_before_the_run(
    tmp_path: Path, output: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_output(application(tmp_path, output=f"output: {output}"))


def test_a_simulated_run_writes_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    application(tmp_path, 20, "output: {file: t/result.csv, columns: [id, rate.error]}")
    app, out = str(tmp_path / "app.yaml"), tmp_path / "run"
    assert main(["run", app, "--output-dir", str(out), "--scheduler", "max-heuristic"]) == 0
    assert pyarrow.csv.read_csv(out / "t/result.csv").num_rows == 20
    assert main(["export", str(out), "--format", "jsonl", "--columns", "id, sum"]) == 0
    assert len((out / "result.jsonl").read_text().splitlines()) == 20
    assert "20 rows written to" in capsys.readouterr().err
    assert main(["export", str(tmp_path)]) == 2
    assert "holds no run (there is no run.json)" in capsys.readouterr().err
    assert main(["export", str(out), "--columns", "ids"]) == 2
    assert "there is no 'ids' (did you mean 'id'?)" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    application(tmp_path, 20, "output: {file: result.parquet}")

    def full(*_: object, **__: object) -> None:
        raise pyarrow.ArrowNotImplementedError("no such type")

    app, out = str(tmp_path / "app.yaml"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.write_table", full)
        assert main(["run", app, "--output-dir", str(out), "--scheduler", "max-heuristic"]) == 1
    said = capsys.readouterr().err
    assert "result.parquet: the joined table could not be written: no such type; every" in said
    for node, lines in (("generate.a", 20), ("generate.b", 20), ("rate", 40), ("sum", 20)):
        assert len((out / f"outputs/{node}.jsonl").read_text().splitlines()) == lines
    assert json.loads((out / "metrics.json").read_text())
    assert main(["export", str(out), "--output", str(out / "result.parquet")]) == 0
    assert pq.read_table(out / "result.parquet").num_rows == 20


def test_names_of_folders_need_not_be_texts(tmp_path: Path) -> None:
    """Linux has file names that are no UTF-8; pyarrow by itself takes none."""
    folder = tmp_path / os.fsdecode(b"b\xff")
    application(folder, 3, "output: {file: result.csv}")
    app, out = str(folder / "app.yaml"), str(folder / "run")
    assert main(["run", app, "--output-dir", out, "--scheduler", "max-heuristic"]) == 0
    assert main(["export", out, "--format", "parquet"]) == 0
    assert len((folder / "run" / "result.csv").read_text().splitlines()) == 4
    assert (folder / "run" / "result.parquet").stat().st_size


def test_a_full_disk_is_named_while_the_rows_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = application(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(RunError, match=r"rows: No space left on device; .* make room"):
        write_layout(tmp_path, loaded)


def test_functions_are_columns(tmp_path: Path) -> None:
    """Values of functions and elements of lists; the call that made a list is no element."""
    app = sl.App("lists", models={"m": "THUDM/chatglm3-6b"}, folder=tmp_path)
    words = app.python("words", split, data=[{"id": "x", "text": "a b"}], max=3, expected=2)
    app.llm("say", model="m", for_each=words, prompt="{{ words }}", max_tokens=4)
    plan = app.plan(gpus=1, scheduler="max-heuristic")
    run = app.run(plan, tmp_path / "run")
    (row,) = run.table(["id", "text", "words", "say"])
    assert row["text"] == "a b"
    assert len(row["words"]) == len(row["say"]) == 3
    elements = run.table(["id", "words"], rows="words")
    assert len(elements) == 3
    assert [r["id"] for r in elements] == ["x/1", "x/2", "x/3"]


def split(row: dict[str, str]) -> list[str]:
    return row["text"].split()


def test_fields_that_only_some_rows_have_are_columns(tmp_path: Path) -> None:
    data = [{"q": "a"}, {"q": "b", "more": 1}, {"q": "c", "late": [2]}]
    app = sl.App(
        "t",
        models={"m": "THUDM/chatglm3-6b"},
        cluster={"gpus": 1, "gpu": "A100-80GB"},
        output={"file": "some.jsonl", "columns": ["late", "id"]},
    )
    app.llm("n", model="m", data=data, prompt="{{ q }}", max_tokens=4)
    run = app.run(app.plan(scheduler="max-heuristic", scenarios=1), tmp_path / "run")
    table = run.to_arrow()
    assert table.column_names == ["id", "q", "more", "late", "n", "n.error"]
    assert table["more"].to_pylist() == [None, 1, None]
    lines = (tmp_path / "run" / "some.jsonl").read_text().splitlines()
    assert [json.loads(line)["late"] for line in lines] == [None, None, [2]]


def test_long_rows_are_read_and_written_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(table_files, "PART_BYTES", 1500)
    texts = [str(random.Random(k).getrandbits(4000)) for k in range(5)]
    rows = [{"q": text} for text in texts]
    app = sl.App(
        "t",
        models={"m": "THUDM/chatglm3-6b"},
        cluster={"gpus": 1, "gpu": "A100-80GB"},
        output={"file": "t.parquet", "columns": ["q"]},
    )
    app.llm("n", model="m", data=rows, prompt="{{ q }}", max_tokens=4)
    app.run(app.plan(scheduler="max-heuristic", scenarios=1), tmp_path / "run")
    groups = pq.ParquetFile(tmp_path / "run" / "rows" / "items.parquet").num_row_groups
    assert groups == 5
    written = pq.ParquetFile(tmp_path / "run" / "t.parquet")
    assert written.num_row_groups == 5
    assert written.read()["q"].to_pylist() == texts
