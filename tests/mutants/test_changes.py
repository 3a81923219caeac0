"""The list of changes keeps up with the code; ``make mutants`` tries them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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
