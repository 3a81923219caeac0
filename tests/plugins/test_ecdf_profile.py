"""Estimators that start from a profile of one's own prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.length import LengthEstimator, LengthObservations, LengthQuery
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.profiling.observations import write_length_profile

HOST = PluginHost.from_settings()
NAMES = ["ecdf", "conditional", "proxy"]


def observed(model: str, lengths: list[int], task: str = "") -> LengthObservations:
    n = len(lengths)
    return LengthObservations(model, task, np.arange(n) + 5, np.array(lengths), np.zeros(n, bool))


def drawn(estimator: LengthEstimator, model: str, task: str = "") -> np.ndarray:
    n = 400
    query = LengthQuery(model, task, np.full(n, 20), np.full(n, 4000), np.zeros(n, np.int64), 8192)
    return estimator.sample(query, np.random.default_rng(0), 2)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.json"
    seen = [observed("me/own-model", [700] * 120), observed("lmsys/vicuna-13b-v1.5", [900] * 380)]
    write_length_profile(path, seen, "mine")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_lengths_of_the_profile_are_drawn(name: str, profile: Path) -> None:
    estimator = HOST.create("length-estimator", name, {"profile": str(profile)})
    assert np.median(drawn(estimator, "own-model")) == pytest.approx(700, abs=5)
    assert "mine" in estimator.source("own-model")
    # a model with bundled lengths: these count as 20 observations beside 380
    found = drawn(estimator, "lmsys/vicuna-13b-v1.5")
    assert np.mean(np.abs(found - 900) < 10) > 0.8
    assert "prior" in estimator.source("lmsys/vicuna-13b-v1.5")


@pytest.mark.parametrize("name", NAMES)
def test_without_a_profile_a_model_gets_the_pooled_lengths_and_they_say_so(name: str) -> None:
    estimator = HOST.create("length-estimator", name, {})
    assert "assumed" in estimator.source("own-model")
    assert len(np.unique(drawn(estimator, "own-model"))) > 20


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_sees_refines_the_profile(name: str, profile: Path) -> None:
    estimator = HOST.create("length-estimator", name, {"profile": str(profile)})
    profile.unlink()  # it is read once
    fitted = estimator.fit([observed("me/own-model", [100] * 10)])
    found = drawn(fitted, "me/own-model")
    assert {100, 700} >= set(np.unique(found).tolist())  # ten observations, and the profile
    assert np.mean(found == 700) > 0.4
    assert np.mean(found == 100) > 0.1
    assert np.median(drawn(estimator, "me/own-model")) == pytest.approx(700, abs=5)


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such length profile"):
        HOST.create("length-estimator", name, {"profile": str(tmp_path / "none.json")})
