"""Cases in which faults were found, and a few more."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.fuzz.files import Corpus

FOUND = {
    ("requests", 9): "a request behind a bad row whose messages are no list",
    ("run", 9): "the same in a run",
    ("requests", 295): "a content part whose type is a mapping",
    ("journal", 14): "a journal record without a kind",
    ("journal", 39): "a journal record that is no object",
    ("journal", 109): "a journal record whose text is a number",
    ("journal", 251): "a journal record with a list for its kind",
    ("journal", 700480): "a journal's plan with a node twice in a stage",
    ("app.yaml", 700537): "a length that no computer's integer holds",
    ("app.yaml", 703292): "a list where further sampling parameters belong",
    ("profile", 700393): "a profile with host seconds for other knots",
    ("profile", 700404): "a profile with a text for a model's size",
    ("profile", 940505): "a coefficient of memory without end",
}
"""What was wrong with the files of these kinds and seeds, which ended in tracebacks."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    yield Corpus(tmp_path_factory.mktemp("fuzz"))
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("kind", "seed"), [*FOUND, *((None, seed) for seed in range(12))])
def test_bad_files_are_refused_properly(corpus: Corpus, kind: str | None, seed: int) -> None:
    _, _, fault = corpus.run(seed, kind)
    assert fault is None, fault.what
