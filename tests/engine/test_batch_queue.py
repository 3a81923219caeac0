"""Engines with several KV cache groups or pipeline stages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from samullm_plugin.engine import (
    Curve,
    EngineConfig,
    NeverFitsError,
    StepLatency,
    StepTable,
    Workload,
    simulate_engine,
)
from samullm_plugin.errors import InputError
from samullm_plugin.model.kv_cache import KvCacheGroup
from samullm_plugin.model.types import Floats

LATENCY = StepLatency(Curve.line(0.004, 1e-5), context_token_s=1e-8, longest_token_s=1e-7)
FULL = KvCacheGroup("full")
SLIDING = KvCacheGroup("sliding_window", window_tokens=64)
TIGHT = EngineConfig(max_num_seqs=32, max_num_batched_tokens=256, num_blocks=90)


class Outside:
    """The same latency as a model the compiled loop does not know."""

    def step_seconds(self, steps: StepTable) -> Floats:
        return LATENCY.step_seconds(steps)


def workload(n: int = 80, arriving: bool = False) -> Workload:
    rng = np.random.default_rng(4)
    arrival_s = np.sort(rng.uniform(0, 3, n)) if arriving else None
    return Workload(rng.integers(1, 300, n), rng.integers(1, 150, n), arrival_s=arrival_s)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_two_groups_of_full_attention_are_one_of_twice_the_blocks(
    async_scheduling: bool, policy: str
) -> None:
    one = replace(TIGHT, async_scheduling=async_scheduling, scheduling_policy=policy)  # type: ignore[arg-type]  # literal
    two = replace(one, kv_cache_groups=(FULL, FULL), num_blocks=2 * (one.num_blocks - 1) + 1)
    given = workload(arriving=True)
    plain, queue = simulate_engine(one, given, LATENCY), simulate_engine(two, given, LATENCY)
    assert plain.num_preemptions > 10
    assert queue.finish_s.tolist() == plain.finish_s.tolist()
    assert queue.first_token_s.tolist() == plain.first_token_s.tolist()
    assert queue.num_preemptions == plain.num_preemptions
    assert queue.computed_tokens == plain.computed_tokens
    assert queue.busy_s == plain.busy_s


def test_a_window_lets_more_sequences_run_in_the_same_pool() -> None:
    """What lies before the window is given back; the full half of the layers is all that grows."""
    rng = np.random.default_rng(1)
    given = Workload(rng.integers(400, 900, 60), rng.integers(50, 150, 60))
    hybrid = replace(TIGHT, num_blocks=400, kv_cache_groups=(FULL, SLIDING))
    full = replace(hybrid, kv_cache_groups=(FULL, FULL))
    with_window = simulate_engine(hybrid, given, LATENCY)
    without = simulate_engine(full, given, LATENCY)
    assert with_window.makespan_s < 0.8 * without.makespan_s


@pytest.mark.parametrize("config", [
    replace(TIGHT, kv_cache_groups=(FULL, SLIDING)),
    replace(TIGHT, kv_cache_groups=(FULL, SLIDING), async_scheduling=True),
    replace(TIGHT, pipeline_parallel_size=3),
])  # fmt: skip
def test_stopped_runs_are_the_beginning_of_whole_ones(config: EngineConfig) -> None:
    given = workload(arriving=True)
    whole = simulate_engine(config, given, LATENCY)
    for stop_s in (share * whole.makespan_s for share in (0.3, 0.5, 0.8)):
        stopped = simulate_engine(config, given, LATENCY, stop_s=stop_s)
        done = whole.finish_s <= stop_s
        assert 0 < done.sum() < len(given)
        assert stopped.finish_s[done].tolist() == whole.finish_s[done].tolist()
        assert np.isinf(stopped.finish_s[~done]).all()
        assert (stopped.generated_tokens[done] == whole.generated_tokens[done]).all()
        assert (stopped.generated_tokens[~done] < given.output_tokens[~done]).all()
        assert stopped.generated_tokens[~done].sum() > 0


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("arriving", [False, True])
def test_outside_model_gives_the_same(async_scheduling: bool, arriving: bool) -> None:
    config = replace(
        TIGHT, kv_cache_groups=(FULL, SLIDING), async_scheduling=async_scheduling, num_blocks=150
    )
    given = workload(arriving=arriving)
    options = {"curve_points": 9, "stop_s": 4.0}
    inside = simulate_engine(config, given, LATENCY, **options)  # type: ignore[arg-type]  # mixed
    outside = simulate_engine(config, given, Outside(), **options)  # type: ignore[arg-type]  # mixed
    assert outside.finish_s == pytest.approx(inside.finish_s, rel=1e-9)
    assert outside.generated_tokens.tolist() == inside.generated_tokens.tolist()
    assert outside.num_steps == inside.num_steps
    assert outside.busy_s == pytest.approx(inside.busy_s)


def test_batches_follow_each_other_through_the_stages() -> None:
    """Two sequences decode in turn, each batch in both stages: full pipeline, then its drain."""
    stage_s = 0.01
    latency = StepLatency(Curve.constant(stage_s))
    config = EngineConfig(max_num_batched_tokens=8, pipeline_parallel_size=2)
    run = simulate_engine(config, Workload(np.array([8, 8]), np.array([50, 50])), latency)
    # Batch k leaves the first stage at (k + 1) and the last at (k + 2) stage times.
    assert run.num_steps == 100
    assert run.makespan_s == pytest.approx(101 * stage_s)
    assert run.finish_s == pytest.approx(np.array([100, 101]) * stage_s)
    alone = simulate_engine(config, Workload(np.array([8]), np.array([50])), latency)
    assert alone.makespan_s == pytest.approx(2 * 50 * stage_s)  # nothing fills the bubbles


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_token_has_passed_all_stages_before_the_next_one(async_scheduling: bool) -> None:
    """Scheduled ahead or not: the last stage is to say from what the first one goes on."""
    config = EngineConfig(pipeline_parallel_size=3, async_scheduling=async_scheduling)
    alone = Workload(np.array([4]), np.array([10]))
    run = simulate_engine(config, alone, StepLatency(Curve.constant(2.0)))
    assert run.finish_s[0] == pytest.approx(10 * 3 * 2.0)


def test_a_pipeline_needs_a_latency_of_one_stage() -> None:
    config = EngineConfig(pipeline_parallel_size=2)
    with pytest.raises(InputError, match="pipeline_parallel_size above 1 needs a StepLatency"):
        simulate_engine(config, workload(3), Outside())


def test_what_never_fits_is_told() -> None:
    config = replace(TIGHT, num_blocks=20, kv_cache_groups=(FULL, SLIDING))
    with pytest.raises(NeverFitsError, match="request 1") as caught:
        simulate_engine(config, Workload(np.array([20, 600]), np.array([5, 5])), LATENCY)
    assert np.isfinite(caught.value.run.finish_s[0])


@pytest.mark.parametrize(("change", "message"), [
    ({"kv_cache_groups": (KvCacheGroup("sliding_window"),)}, "window_tokens is 0"),
    ({"kv_cache_groups": (replace(FULL, window_tokens=9),)}, "window_tokens is 9"),
    ({"kv_cache_groups": (FULL, KvCacheGroup("mamba")), "enable_prefix_caching": True},
     "state-space"),
    ({"kv_cache_groups": (replace(FULL, block_size=32),
                          KvCacheGroup("chunked_local", window_tokens=64)),
      "enable_prefix_caching": True}, "blocks of one size"),
    ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0"),
])  # fmt: skip
def test_settings_no_engine_can_run_with(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TIGHT, **change)  # type: ignore[arg-type]  # any of its fields
