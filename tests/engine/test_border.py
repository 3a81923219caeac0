"""Figures that no engine can have are refused before compiled code, which checks nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from samullm_plugin.engine import Curve, StepLatency
from samullm_plugin.engine.simulate import simulate_engine
from samullm_plugin.engine.workload import Workload
from samullm_plugin.errors import SamullmError
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import LONGEST_S, StepTable
from samullm_plugin.model.types import Floats

CONFIG = EngineConfig(
    num_blocks=200, block_size=16, max_num_seqs=8, max_num_batched_tokens=256, max_model_len=1024
)
USUAL = StepLatency(Curve.line(0.01, 0.0001))


def workload(**changes: Any) -> Workload:
    """Return twenty requests that arrive one after the other."""
    lengths: dict[str, Any] = {
        "prompt_tokens": np.full(20, 50),
        "output_tokens": np.arange(20) * 7 + 1,
        "arrival_s": np.arange(20.0),
    }
    return Workload(**{**lengths, **changes})


class Constant:
    """A latency model outside the compiled loop."""

    def __init__(self, value_s: float) -> None:
        self.value_s = value_s

    def step_seconds(self, steps: StepTable) -> Floats:
        """Return the same for all."""
        return np.full(len(steps), self.value_s)


@pytest.mark.parametrize("value_s", [1e308, -1e308, math.inf, math.nan])
@pytest.mark.parametrize("field", ["launch_s", "context_token_s", "prefill_pair_s"])
def test_seconds_of_no_iteration(field: str, value_s: float) -> None:
    """They ended the process with a segmentation fault, or the loop never ended."""
    latency = StepLatency(USUAL.by_tokens, **{field: value_s})
    with pytest.raises(SamullmError, match=rf"latency: {field} comes to .*86,400 s"):
        simulate_engine(CONFIG, workload(), latency)


def test_curves_that_go_beyond_at_the_limits_of_an_engine() -> None:
    steep = StepLatency(Curve((0.0, 1.0), (0.0, 1e305)))
    with pytest.raises(SamullmError, match="by_tokens comes to"):
        simulate_engine(CONFIG, workload(), steep)


@pytest.mark.parametrize("value_s", [1e308, 1e18, -1.0, math.inf, math.nan])
def test_models_outside(value_s: float) -> None:
    with pytest.raises(SamullmError, match="latency model Constant: step_seconds"):
        simulate_engine(CONFIG, workload(), Constant(value_s))


@pytest.mark.parametrize("value_s", [1e308, -1e308, 1e18, math.inf, math.nan])
def test_moments(value_s: float) -> None:
    with pytest.raises(SamullmError, match="request 3: arrival_s"):
        simulate_engine(CONFIG, workload(arrival_s=np.where(np.arange(20) == 3, value_s, 1)), USUAL)
    with pytest.raises(SamullmError, match="release_delay_s is"):
        simulate_engine(CONFIG, workload(), USUAL, release_delay_s=value_s)


@pytest.mark.parametrize("value_s", [LONGEST_S, 0.0, 5e-324])
def test_what_is_just_possible_comes_to_its_end(value_s: float) -> None:
    latency = StepLatency(Curve.constant(value_s))
    found = simulate_engine(CONFIG, workload(output_tokens=np.full(20, 2**62)), latency)
    assert np.isfinite(found.finish_s).all()
    assert found.generated_tokens.tolist() == [1024 - 50] * 20
