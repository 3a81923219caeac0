"""Properties every simulated run has, whatever the workload."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from samullm_plugin.engine import (
    Curve,
    EngineConfig,
    EngineRun,
    NeverFitsError,
    StepLatency,
    StepTable,
    Workload,
    simulate_engine,
)
from tests.conformance.compare import Case
from tests.conformance.workloads import cases

LATENCY = StepLatency(
    Curve((1.0, 16.0, 17.0, 600.0), (0.004, 0.004, 0.005, 0.02)),
    Curve.line(0.0, 2e-5),
    prefill_token_s=1e-6,
    prefill_pair_s=1e-9,
    context_token_s=3e-8,
    longest_token_s=4e-7,
    host_by_seqs=Curve.line(0.004, 3e-5),
    overlap_host=True,
    prefill_seq_s=1e-5,
    launch_s=0.0041,
    prefill_launch_s=0.0045,
    prefill_step_s=0.0007,
    longest_over_seqs=2,
)

quick = settings(
    max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


class Outside:
    """The same seconds from a model the compiled loop does not know."""

    def __init__(self, latency: StepLatency) -> None:
        self.latency = latency
        self.calls = 0

    def step_seconds(self, steps: StepTable) -> np.ndarray:
        self.calls += 1
        return self.latency.step_seconds(steps)


@st.composite
def timed_cases(draw: st.DrawFn) -> Case:
    """Draw a case whose arrivals, if any, are by time."""
    case = draw(cases())
    workload = case.workload
    if workload.arrival_step is not None:
        arrival_s = workload.arrival_step * draw(st.sampled_from((0.0, 0.004, 0.011, 0.5)))
        workload = replace(workload, arrival_step=None, arrival_s=arrival_s)
    return replace(case, workload=workload)


def run(case: Case, latency: object = LATENCY, **options: object) -> tuple[EngineRun, bool]:
    try:
        result = simulate_engine(
            case.config,
            case.workload,
            latency,  # type: ignore[arg-type]  # any model
            **options,  # type: ignore[arg-type]  # of simulate_engine
        )
    except NeverFitsError as error:
        return error.run, False
    return result, True


def outputs(case: Case) -> np.ndarray:
    w = case.workload
    return np.minimum(w.output_tokens, case.config.max_model_len - w.prompt_tokens)


@quick
@given(timed_cases())
def test_tokens_blocks_and_clock(case: Case) -> None:
    result, complete = run(case, record_steps=True)
    trace = result.steps
    assert trace is not None
    n = len(case.workload)
    usable = case.config.num_blocks - 1
    assert trace.seq_tokens.sum() == result.computed_tokens == trace.table.num_tokens.sum()
    assert (trace.table.num_tokens <= case.config.max_num_batched_tokens).all()
    assert (trace.table.num_seqs <= case.config.max_num_seqs).all()
    assert (trace.free_blocks >= 0).all()
    assert len(trace.free_blocks) == 0 or result.peak_blocks == usable - trace.free_blocks.min()
    assert (np.diff(trace.start_s) > 0).all()
    assert (np.diff(trace.step) > 0).all()
    seconds = LATENCY.step_seconds(trace.table)
    assert result.busy_s == pytest.approx(seconds.sum())
    assert (trace.start_s[1:] >= trace.start_s[:-1] + seconds[:-1] - 1e-9).all()
    assert (
        sorted(trace.finished_request.tolist())
        == np.flatnonzero(np.isfinite(result.finish_s)).tolist()
    )
    if not complete:
        return
    assert (result.generated_tokens == outputs(case)).all()
    assert len(trace.finished_request) == n
    # Every token but the last is computed once, and again only after preemption or not at all
    # where it was found in the cache.
    needed = int((case.workload.prompt_tokens + outputs(case) - 1).sum())
    assert result.computed_tokens + result.cached_tokens >= needed
    if result.num_preemptions == 0:
        assert result.computed_tokens + result.cached_tokens == needed
    assert (result.first_token_s <= result.finish_s).all()
    if case.workload.arrival_s is not None:
        assert (result.first_token_s > case.workload.arrival_s).all()


@quick
@given(timed_cases())
def test_steps_asked_for_or_not(case: Case) -> None:
    recorded, _ = run(case, record_steps=True)
    leaping, _ = run(case)
    assert leaping.finish_s == pytest.approx(recorded.finish_s, rel=1e-9)
    assert leaping.first_token_s == pytest.approx(recorded.first_token_s, rel=1e-9)
    for name in ("num_steps", "num_preemptions", "peak_blocks", "computed_tokens", "cached_tokens"):
        assert getattr(leaping, name) == getattr(recorded, name)


@quick
@given(timed_cases(), st.floats(0, 1))
def test_stopped_run_is_the_beginning_of_the_whole(case: Case, fraction: float) -> None:
    whole, _ = run(case, record_steps=True)
    trace = whole.steps
    assert trace is not None
    stop_s = fraction * whole.makespan_s
    stopped, _ = run(case, stop_s=stop_s)
    ends = trace.start_s + LATENCY.step_seconds(trace.table)
    assume((np.abs(ends - stop_s) > 1e-9).all())  # either would be right
    rows = int((ends <= stop_s).sum())
    assert stopped.num_steps == rows
    done = whole.finish_s <= stop_s
    assert (np.isfinite(stopped.finish_s) == done).all()
    assert stopped.finish_s[done] == pytest.approx(whole.finish_s[done])
    assert stopped.computed_tokens == trace.table.num_tokens[:rows].sum()
    assert (stopped.generated_tokens[done] == whole.generated_tokens[done]).all()
    assert (stopped.generated_tokens[~done] < outputs(case)[~done]).all()


@quick
@given(timed_cases(), st.sampled_from((0.0, 0.03)), st.sampled_from((math.inf, 0.2)))
def test_outside_model_gives_the_same(case: Case, delay_s: float, stop_s: float) -> None:
    options = {"release_delay_s": delay_s, "stop_s": stop_s, "curve_points": 9}
    inside, fits = run(case, **options)
    outside, fits_as_well = run(case, Outside(LATENCY), **options)
    assert fits == fits_as_well
    assert outside.finish_s == pytest.approx(inside.finish_s, rel=1e-9)
    assert outside.first_token_s == pytest.approx(inside.first_token_s, rel=1e-9)
    assert outside.generated_tokens.tolist() == inside.generated_tokens.tolist()
    assert outside.num_steps == inside.num_steps
    assert outside.busy_s == pytest.approx(inside.busy_s)
    assert inside.curve is not None
    assert outside.curve is not None
    assert outside.curve.time_s == pytest.approx(inside.curve.time_s)


@quick
@given(timed_cases(), st.sampled_from((2, 3, 4, 5, 17, 64)))
def test_progress_counts_every_token_once(case: Case, points: int) -> None:
    case = replace(case, config=replace(case.config, enable_prefix_caching=False))
    result, complete = run(case, curve_points=points)
    curve = result.curve
    assert curve is not None
    assert len(curve.time_s) <= points
    assert curve.time_s[0] == curve.tokens[0] == curve.pairs[0] == 0
    assert (np.diff(curve.time_s) > 0).all()
    assert (np.diff(curve.tokens) >= 0).all()  # a step may do nothing but compute again
    if complete:
        lengths = case.workload.prompt_tokens + outputs(case) - 1
        assert curve.tokens[-1] == lengths.sum()
        assert curve.pairs[-1] == pytest.approx((lengths * (lengths + 1) / 2).sum())


def test_outside_model_is_not_called_per_step() -> None:
    rng = np.random.default_rng(1)
    workload = Workload(rng.integers(1, 500, 500), rng.integers(1, 300, 500))
    case = Case(EngineConfig(), workload)
    model = Outside(LATENCY)
    result, _ = run(case, model)
    assert result.num_steps > 300
    assert model.calls == 1


def numbered_from(k: int, workload: Workload) -> Workload:
    """Put ``k`` requests before the others that come when these have long finished."""

    def before(column: np.ndarray | None, value: float) -> np.ndarray | None:
        return None if column is None else np.r_[np.full(k, value, column.dtype), column]

    w, ids, indptr = workload, workload.prompt_token_ids, workload.release_indptr
    arrival_s = np.zeros(len(w)) if w.arrival_s is None else w.arrival_s
    return Workload(
        np.r_[np.ones(k, np.int64), w.prompt_tokens],
        np.r_[np.ones(k, np.int64), w.output_tokens],
        arrival_s=before(arrival_s, 1e6),
        priority=before(w.priority, 0),
        prefix_id=before(w.prefix_id, -1),
        prefix_tokens=before(w.prefix_tokens, 0),
        prompt_token_ids=None if ids is None else (*[np.array([9])] * k, *ids),
        release_index=None if w.release_index is None else w.release_index + k,
        release_indptr=None if indptr is None else np.r_[np.zeros(k, np.int64), indptr],
    )


@quick
@given(timed_cases(), st.integers(1, 6))
def test_the_number_of_a_request_is_only_a_name(case: Case, k: int) -> None:
    plain, complete = run(case)
    assume(complete)
    other, _ = run(replace(case, workload=numbered_from(k, case.workload)))
    assert other.finish_s[k:] == pytest.approx(plain.finish_s, rel=1e-9)
    assert other.computed_tokens == plain.computed_tokens + k
    assert other.num_preemptions == plain.num_preemptions
