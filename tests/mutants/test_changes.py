"""The list of changes keeps up with the code; ``make mutants`` tries them."""

from __future__ import annotations

import ast
import signal
import subprocess
from pathlib import Path

import pytest

from tests.mutants.__main__ import judged
from tests.mutants.changes import CHANGES, Change

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: f"{Path(c.file).stem}: {c.what}")
def test_the_change_can_be_made(change: Change) -> None:
    text = (ROOT / change.file).read_text(encoding="utf-8")
    ast.parse(change.apply(text))
    for test in change.tests:
        assert (ROOT / test.partition("::")[0]).exists(), test


def test_a_place_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 0 times"):
        CHANGES[0].apply("")


def ended(code: int, output: str) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(["pytest"], code, output, "")


def test_only_a_failure_counts_as_noticed() -> None:
    """A wrong argument, no tests, an end of pytest by itself or by somebody are none."""
    assert judged(ended(0, "3 passed")) is None
    assert judged(ended(-signal.SIGXCPU, "")) == "timed out"
    for crash in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        assert judged(ended(-crash, "...")) == "crashed"
    assert judged(ended(1, "FAILED tests/a.py::test_b - assert 0")) == "tests/a.py::test_b"
    assert judged(ended(2, "ERROR tests/a.py - ImportError")) == "tests/a.py"
    for code in (3, 4, 5, -9, 139):
        with pytest.raises(RuntimeError, match=f"ended with {code}"):
            judged(ended(code, "ERROR: not found: tests/a.py"))
    for code in (1, 2):  # interrupted by somebody, or nothing named
        with pytest.raises(RuntimeError, match=f"ended with {code}"):
            judged(ended(code, "no tests ran"))
