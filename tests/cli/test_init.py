"""``samullm init``: what it writes runs; wrong folders and names are refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import samullm_plugin as sl
from samullm_plugin.cli.app import main

LAST = {"preference": "rate", "judging": "winner", "extraction": "page", "cascade": "explain"}


@pytest.mark.parametrize("example", LAST)
def test_every_starter_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], example: str
) -> None:
    """What a newcomer does: look, run (simulated), read the table."""
    assert main(["init", str(tmp_path / example), "--example", example]) == 0
    file, run = tmp_path / example / "app.yaml", tmp_path / "run"
    assert main(["validate", str(file)]) == 0
    assert main(["preview", str(file), "--rows", "1"]) == 0
    assert " failed" not in capsys.readouterr().err
    assert main(["run", str(file), "--output-dir", str(run)]) == 0
    table = sl.AppRun.open(run).table()
    rows = list(table)
    nodes = {n.name for n in sl.App.from_yaml(file).load().app.all_nodes}
    assert nodes <= set(table.columns)
    last = [row for row in rows if row[LAST[example]] is not None]
    assert len(last) == len(rows) >= 4
    written = pq.read_table(run / "result.parquet").to_pylist()
    assert [r["id"] for r in written] == [r["id"] for r in rows]


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for words, message in (
        ([tmp_path], "is not an empty folder; name a new one"),
        ([tmp_path / "file"], "is not an empty folder; name a new one"),
        ([tmp_path / "x", "--example", "preferenc"], "did you mean 'preference'"),
    ):
        assert main(["init", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
