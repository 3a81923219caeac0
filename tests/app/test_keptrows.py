"""Rows are kept as they were read, whoever changes their table afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.app.keptrows import PLACES
from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import build_application
from samullm_plugin.app.spec import AppSpec

ROWS: list[dict[str, Any]] = [
    {"id": f"r{k}", "text": f"Text {k}", "part": k % 7, "share": None if k % 5 else k / 4}
    for k in range(2 * len(PLACES) + 100)
]


def load(folder: Path, name: str, tables: Any = None, **more: Any) -> LoadedApplication:
    """Load one node that reads a table."""
    spec = {
        "version": 1,
        "name": "t",
        "models": {"a": {"model": "THUDM/chatglm3-6b"}},
        "nodes": {
            "n": {
                "model": "a",
                "requests": {"file": name, **more},
                "prompt": "{{ text }} of {{ part }}",
                "sampling_params": {"max_tokens": 8},
            }
        },
    }
    return build_application(AppSpec.model_validate(spec), folder / "app.yaml", tables=tables)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table as its name says."""
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        pyarrow.feather.write_feather(pa.Table.from_pylist(rows), path, compression="uncompressed")


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet", "r.feather"])
def test_files_may_change_once_they_are_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    some = load(tmp_path, name, where={"part": [2, 3]}, limit=1500)
    app = load(tmp_path, name)
    with (tmp_path / name).open("r+b") as file:  # in place
        file.truncate(100)
        file.write(b"x" * 10_000)
    assert app.sources is not None
    fields = app.sources[0].fields
    assert list(fields) == ROWS
    assert fields[len(PLACES) + 3] == ROWS[len(PLACES) + 3]
    assert (fields[-1], fields[1:3]) == (ROWS[-1], tuple(ROWS[1:3]))
    made = app.conversation(0, len(PLACES), lambda node, request: None)
    assert made == f"Text {len(PLACES)} of {ROWS[len(PLACES)]['part']}"
    assert some.sources is not None
    assert list(some.sources[0].fields) == [r for r in ROWS if r["part"] in (2, 3)][:1500]


def test_tables_in_memory_may_change_once_they_are_read(tmp_path: Path) -> None:
    import pandas as pd

    table = pd.DataFrame([{**row, "share": 1.5} for row in ROWS])
    app = load(tmp_path, "n", {"n": table})
    table.loc[:, "part"] = -1
    assert app.sources is not None
    assert app.sources[0].fields[5]["part"] == 5
    assert app.sources[0].ids[-1] == ROWS[-1]["id"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_an_id_that_comes_again_blocks_later_is_told_with_its_first_row(
    tmp_path: Path, name: str
) -> None:
    write(tmp_path / name, [*ROWS, {**ROWS[3], "text": "again"}])
    unit = "line" if name == "r.jsonl" else "row"
    with pytest.raises(Exception, match=rf"{unit} {len(ROWS) + 1}: the id 'r3' .* {unit} 4; ids"):
        load(tmp_path, name)


def test_plain_lines_are_told_from_all_others_line_by_line(tmp_path: Path) -> None:
    """Blocks of nothing but ids and texts are taken as a whole; one other line changes nothing."""
    rows = [{"id": f"r{k}", "text": f"T{k}", "part": k, "none": None} for k in range(len(PLACES))]
    odd: list[dict[str, Any]] = [
        {"text": "no id", "part": 1},
        {"id": 7, "text": "a number", "part": 1},
        {"id": "own", "text": "own limit", "part": 1, "max_tokens": 3},
        {"custom_id": "batch", "text": "of a batch", "part": 1, "prompt": None},
        {"id": "r0", "text": "again", "part": 1},
        {"id": "last", "text": "last", "part": 1, "pormpt": "x"},
    ]
    write(tmp_path / "r.jsonl", [*rows, *odd])
    first = len(PLACES) + 1
    with pytest.raises(Exception, match=rf"line {first + 4}: the id 'r0' is already .* line 1;"):
        load(tmp_path, "r.jsonl")
    write(tmp_path / "r.jsonl", [*rows, *odd[:4], odd[5]])
    app = load(tmp_path, "r.jsonl")
    assert app.sources is not None
    source, table = app.sources[0], app.app.nodes[0].requests
    assert source.ids[:2] == ("r0", "r1")
    assert source.ids[-5:] == (f"line-{first}", "7", "own", "batch", "last")
    assert source.fields[0] == rows[0]
    assert table.max_tokens[-3:].tolist() == [3, 8, 8]
    assert "prompt" not in source.fields[-2]
    assert any(f"line {first + 4}: the field 'pormpt'" in note for note in app.app.notes)


def test_lines_that_say_alike_are_checked_once_and_no_two_are_taken_for_each_other(
    tmp_path: Path,
) -> None:
    limits: list[Any] = [1, 2, 2.0, "3", 1]
    rows = [{"id": f"r{k}", "text": "t", "part": 0, "max_tokens": m} for k, m in enumerate(limits)]
    write(tmp_path / "r.jsonl", rows)
    assert load(tmp_path, "r.jsonl").app.nodes[0].requests.max_tokens.tolist() == [1, 2, 2, 3, 1]
    write(tmp_path / "r.jsonl", [*rows, {**rows[0], "id": "bad", "max_tokens": 1.5}])
    with pytest.raises(Exception, match=r"line 6: max_tokens"):
        load(tmp_path, "r.jsonl")
