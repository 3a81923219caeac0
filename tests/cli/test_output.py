"""JSON for machines, tables for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from samullm_plugin.cli.output import print_table, progress, write_json
from samullm_plugin.errors import InputError


@dataclass(frozen=True, slots=True)
class Result:
    seconds: object
    path: Path


def test_json_understands_results(capsys) -> None:
    write_json([Result(np.float64(1.5), Path("a")), np.array([1, 2]), float("nan"), np.int64(7)])
    assert json.loads(capsys.readouterr().out) == [
        {"seconds": 1.5, "path": "a"},
        [1, 2],
        None,
        7,
    ]


def test_json_goes_to_a_file(tmp_path, capsys) -> None:
    write_json({"a": 1}, str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": 1}
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"missing/out.json: cannot be written: No such file"):
        write_json({}, str(tmp_path / "missing" / "out.json"))


def test_json_refuses_what_it_cannot_write() -> None:
    with pytest.raises(Exception, match="object"):
        write_json(object())


def test_tables_go_to_stderr_whole(capsys) -> None:
    print_table(["Name", "Seconds"], [("a [b]", 1.0), ("x" * 90, None)], numbers=["Seconds"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a [b]" in captured.err
    assert "x" * 90 in captured.err
    assert captured.err.splitlines()[-2].rstrip().endswith("-")


def test_progress_is_silent_off_a_terminal(capsys) -> None:
    with progress("running", 2) as advance:
        advance("one")
    assert capsys.readouterr().err == ""
