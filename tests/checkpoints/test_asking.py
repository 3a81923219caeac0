"""Answers of child processes, and which of them are kept."""

from __future__ import annotations

import json
from pathlib import Path

from samullm_plugin.checkpoints import asking
from samullm_plugin.checkpoints.asking import ask, cache_folder, installed

COUNT = """
import json, pathlib, sys
file = pathlib.Path(json.load(sys.stdin)["file"])
times = len(file.read_text()) if file.exists() else 0
file.write_text("x" * (times + 1))
"""
"""Counts how often it was run, before whatever follows."""


def asked(file: Path, then: str, limit_s: float = 60.0) -> tuple[object, int]:
    """Ask twice, as two commands do; return the last answer and how often the script was run."""
    for _ in range(2):
        asking._answers.clear()
        answer = ask("tests", COUNT + then, json.dumps({"file": str(file)}), "1", limit_s=limit_s)
    return answer, len(file.read_text())


def test_answers_are_kept_also_that_there_is_none(tmp_path: Path) -> None:
    assert asked(tmp_path / "a", 'print("answer", [1, 2])') == ([1, 2], 1)
    assert asked(tmp_path / "b", 'sys.exit("no such model")') == (None, 1)


def test_children_that_were_killed_or_took_too_long_are_asked_again(tmp_path: Path) -> None:
    before = set(cache_folder("tests").glob("*"))
    assert asked(tmp_path / "a", "import os; os.kill(os.getpid(), 9)") == (None, 2)
    assert asked(tmp_path / "b", "import time; time.sleep(60)", limit_s=2.0) == (None, 2)
    assert set(cache_folder("tests").glob("*")) == before


def test_versions_are_told_without_imports() -> None:
    assert installed("numpy")
    assert installed("no_such_package") is None
