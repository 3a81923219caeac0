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
