"""``samullm init``: what it writes runs; wrong folders and names are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from samullm_plugin.cli.app import main


def test_the_starter_is_previewed_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "answers"
    assert main(["init", str(folder), "--example", "preference"]) == 0
    assert {p.name for p in folder.iterdir()} == {"app.yaml", "instructions.csv"}
    assert main(["validate", str(folder / "app.yaml")]) == 0
    assert main(["preview", str(folder / "app.yaml"), "--rows", "1"]) == 0
    assert "Rate the answer from 1 to 10" in capsys.readouterr().out


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
