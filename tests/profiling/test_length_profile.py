"""Measured output lengths as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.length import LengthObservations
from samullm_plugin.profiling.observations import (
    read_length_profile,
    summary,
    write_length_profile,
)

SEEN = LengthObservations(
    "org/m", "t", np.array([3, 4, 5]), np.array([7, 9, 9]), np.array([False, True, False])
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_length_profile(tmp_path / "lengths.json", [SEEN], "mine")
    return tmp_path / "lengths.json"


def test_what_is_written_is_read(path: Path) -> None:
    found = read_length_profile(path)
    (seen,) = found.observations
    assert found.source == "mine"
    assert (seen.model, seen.task) == ("org/m", "t")
    for column in ("prompt_tokens", "output_tokens", "censored"):
        assert getattr(seen, column).tolist() == getattr(SEEN, column).tolist()
        assert getattr(seen, column).dtype == getattr(SEEN, column).dtype
    assert [p.name for p in path.parent.iterdir()] == ["lengths.json"]


def test_the_summary_does_not_take_a_cut_output_for_a_short_one() -> None:
    half_cut = LengthObservations(
        "m", "", np.ones(100, int), np.full(100, 50), np.arange(100) % 2 == 0
    )
    figures: Any = summary(half_cut)
    assert figures["cut_at_limit"] == 50
    assert figures["quantiles"]["0.25"] == 50
    assert figures["quantiles"]["0.95"] is None  # nobody knows
    all_cut = LengthObservations("m", "", np.ones(3, int), np.full(3, 50), np.ones(3, bool))
    quantiles: Any = summary(all_cut)["quantiles"]
    assert set(quantiles.values()) == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "samullm-plan-1"}, "format: 'samullm-plan-1' instead of"),
        ({"lengths": []}, "lengths"),
        ({"surprise": 1}, "surprise"),
        ({"lengths": [{"model": "m", "prompt_tokens": [1], "output_tokens": [0],
                       "censored": [False]}]}, "output_tokens.0"),
        ({"lengths": [{"model": "m", "prompt_tokens": [1], "output_tokens": [1, 2],
                       "censored": [False]}]}, "must be as many"),
        ({"lengths": [{"model": "", "prompt_tokens": [1], "output_tokens": [1],
                       "censored": [False]}]}, "model"),
    ],
)  # fmt: skip
def test_a_faulty_file_is_named(path: Path, change: dict[str, object], message: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as caught:
        read_length_profile(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_another_file_is_named(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InputError, match=r"lengths\.json: "):
        read_length_profile(path)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="samullm profile lengths"):
        read_length_profile(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_length_profile(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_length_profile(tmp_path / "none" / "a.json", [SEEN], "")
