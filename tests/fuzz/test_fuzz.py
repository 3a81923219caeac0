"""Cases in which faults were found, and a few more."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.fuzz.files import Corpus

FOUND = {
    33: "a request behind a bad row whose messages are no list",
    75: "the same in a run",
    1006: "a journal record that is a list",
    1011: "a journal record with a list for its kind",
    1054: "a content part whose type is a mapping",
    1070: "a journal record without a kind",
}
"""What was wrong with the files of these seeds, which ended in tracebacks."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    yield Corpus(tmp_path_factory.mktemp("fuzz"))
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", [*FOUND, *range(12)])
def test_bad_files_are_refused_properly(corpus: Corpus, seed: int) -> None:
    _, _, fault = corpus.run(seed)
    assert fault is None, fault.what
