"""What a simulated engine does, on workloads small enough to follow by hand."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from samullm_plugin.engine import (
    Curve,
    EngineCache,
    EngineConfig,
    EngineJob,
    NeverFitsError,
    StepLatency,
    StepTable,
    Workload,
    simulate_engine,
    simulate_engines,
)
from samullm_plugin.errors import InputError, SamullmError

CONFIG = EngineConfig(num_blocks=1000)
SECOND = StepLatency(Curve.constant(1.0))


def workload(*lengths: tuple[int, int], **columns: object) -> Workload:
    prompts, outputs = zip(*lengths, strict=True)
    return Workload(np.array(prompts), np.array(outputs), **columns)  # type: ignore[arg-type]


def test_a_token_a_second() -> None:
    run = simulate_engine(CONFIG, workload((10, 3), (20, 5)), SECOND)
    assert run.first_token_s.tolist() == [1.0, 1.0]
    assert run.finish_s.tolist() == [3.0, 5.0]
    assert (run.makespan_s, run.busy_s, run.num_steps) == (5.0, 5.0, 5)
    assert run.computed_tokens == 10 + 2 + 20 + 4
    assert run.peak_blocks == 1 + 2


def test_arrivals_by_time_are_seen_by_the_next_step() -> None:
    run = simulate_engine(
        CONFIG, workload((1, 2), (1, 1), (1, 1), arrival_s=np.array([0.0, 1.5, 9.0])), SECOND
    )
    assert run.finish_s.tolist() == [2.0, 3.0, 10.0]
    assert run.busy_s == 4.0


def test_asynchronous_scheduling_is_one_step_ahead() -> None:
    config = replace(CONFIG, async_scheduling=True)
    run = simulate_engine(config, workload((1, 9), (1, 1), arrival_s=np.array([0.0, 1.5])), SECOND)
    assert run.finish_s.tolist() == [9.0, 4.0]


def test_successors_arrive_at_the_finish_and_after_those_that_came_before() -> None:
    w = workload(
        (1, 2),
        (1, 1),
        (1, 1),
        arrival_s=np.array([0.0, 0.0, 1.9]),
        release_index=np.array([1]),
        release_indptr=np.array([0, 1, 1, 1]),
    )
    run = simulate_engine(replace(CONFIG, max_num_seqs=1), w, SECOND)
    assert run.finish_s.tolist() == [2.0, 4.0, 3.0]
    delayed = simulate_engine(CONFIG, w, SECOND, release_delay_s=5.0)
    assert delayed.finish_s.tolist() == [2.0, 8.0, 3.0]


def test_several_predecessors() -> None:
    w = workload(
        (1, 2),
        (1, 4),
        (1, 1),
        release_index=np.array([2, 2]),
        release_indptr=np.array([0, 1, 2, 2]),
    )
    assert simulate_engine(CONFIG, w, SECOND).finish_s.tolist() == [2.0, 4.0, 5.0]


def test_requests_that_wait_for_each_other_are_refused() -> None:
    w = workload((1, 1), (1, 1), release_index=np.array([1, 0]), release_indptr=np.array([0, 1, 2]))
    with pytest.raises(InputError, match="request 0 waits"):
        simulate_engine(CONFIG, w, SECOND)


def test_stop_counts_iterations_that_end_by_then() -> None:
    w = workload((10, 3), (20, 5), (7, 9), arrival_s=np.array([0.0, 0.0, 3.5]))
    stopped = simulate_engine(CONFIG, w, SECOND, stop_s=4.0)
    assert stopped.finish_s.tolist() == [3.0, math.inf, math.inf]
    assert stopped.generated_tokens.tolist() == [3, 4, 0]
    assert stopped.num_steps == 4
    assert simulate_engine(CONFIG, w, SECOND, stop_s=3.999).generated_tokens.tolist() == [3, 3, 0]
    assert simulate_engine(CONFIG, w, SECOND, stop_s=0.5).generated_tokens.tolist() == [0, 0, 0]


def test_never_fits_names_the_request_and_its_blocks() -> None:
    with pytest.raises(NeverFitsError, match=r"request 1 needs 4 .* has 3 ") as caught:
        simulate_engine(replace(CONFIG, num_blocks=4), workload((9, 2), (60, 1)), SECOND)
    assert caught.value.run.finish_s.tolist() == [2.0, math.inf]


def test_shared_prefix_is_computed_once() -> None:
    w = workload((100, 1), (100, 1), prefix_id=np.array([3, 3]), prefix_tokens=np.array([70, 70]))
    caching = replace(CONFIG, enable_prefix_caching=True)
    run = simulate_engine(caching, w, SECOND)
    assert run.cached_tokens == 64
    assert run.computed_tokens == 136
    assert simulate_engine(CONFIG, w, SECOND).cached_tokens == 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_tokens": np.array([0, 1])}, "request 0: prompt_tokens is 0"),
        ({"output_tokens": np.array([5, -1])}, "request 1: output_tokens is -1"),
        ({"prompt_tokens": np.array([1, 8192])}, "request 1: its prompt of 8192 tokens"),
        ({"arrival_s": np.array([0.0, math.nan])}, "request 1: arrival_s is nan"),
        ({"arrival_s": np.zeros(3)}, "arrival_s has 3 rows"),
        ({"arrival_s": np.zeros(2), "arrival_step": np.zeros(2)}, "not both"),
        ({"prompt_token_ids": (np.zeros(1), np.zeros(9))}, "request 1: 9 prompt_token_ids"),
        ({"release_index": np.zeros(1, int)}, "go together"),
    ],
)
def test_wrong_workloads(columns: dict[str, object], message: str) -> None:
    lengths = {"prompt_tokens": np.array([1, 2]), "output_tokens": np.array([1, 2])}
    with pytest.raises(InputError, match=message):
        simulate_engine(CONFIG, Workload(**{**lengths, **columns}), SECOND)  # type: ignore[arg-type]


def test_no_requests() -> None:
    none = Workload(np.zeros(0, np.int64), np.zeros(0, np.int64))
    run = simulate_engine(CONFIG, none, SECOND, record_steps=True, curve_points=4)
    assert (run.makespan_s, run.num_steps, len(run.finish_s)) == (0.0, 0, 0)


def test_outside_model_that_answers_nonsense() -> None:
    class Negative:
        def step_seconds(self, steps: StepTable) -> np.ndarray:
            return np.full(len(steps), -1.0)

    with pytest.raises(SamullmError, match="latency model Negative"):
        simulate_engine(CONFIG, workload((1, 1)), Negative())


def test_cache_reuses_identical_jobs_only() -> None:
    cache = EngineCache()
    w = workload((10, 3), (20, 5))
    job = EngineJob(CONFIG, w, SECOND)
    same = EngineJob(CONFIG, workload((10, 3), (20, 5)), StepLatency(Curve.constant(1.0)))
    others = [
        replace(job, stop_s=2.0),
        replace(job, latency=StepLatency(Curve.constant(2.0))),
        replace(job, config=replace(CONFIG, max_num_seqs=1)),
        replace(job, workload=replace(w, priority=np.array([1, 0]))),
        replace(job, workload=workload((10, 5), (20, 3))),
    ]
    first = simulate_engines([job, same, *others], cache=cache)
    assert first[0] is first[1]
    assert (cache.hits, cache.misses) == (0, 6)
    again = simulate_engines([same], cache=cache)
    assert again[0] is first[0]
    assert cache.hits == 1
    with pytest.raises(ValueError, match="read-only"):
        again[0].finish_s[0] = 0.0


def test_cache_is_bounded() -> None:
    cache = EngineCache(max_requests=200)
    for seconds in range(1, 9):
        latency = StepLatency(Curve.constant(float(seconds)))
        simulate_engines([EngineJob(CONFIG, workload((1, 1), (1, 1)), latency)], cache=cache)
    assert len(cache) == 3


def test_threads_give_what_one_does() -> None:
    rng = np.random.default_rng(5)
    jobs = [
        EngineJob(
            EngineConfig(num_blocks=2000),
            Workload(rng.integers(1, 300, 800), rng.integers(50, 300, 800)),
            SECOND,
            curve_points=8,
        )
        for _ in range(4)
    ]
    together = simulate_engines(jobs, max_workers=4)
    alone = [job.run() for job in jobs]
    assert [r.makespan_s for r in together] == [r.makespan_s for r in alone]


@pytest.mark.parametrize("seed", range(40))
def test_replicas_run_as_each_would_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = EngineConfig(
        num_blocks=int(rng.integers(70, 400)),  # few: sequences are preempted
        max_num_seqs=int(rng.integers(1, 30)),
        max_model_len=1024,
        max_num_batched_tokens=2048,
        enable_prefix_caching=bool(seed % 2),
        async_scheduling=bool(seed // 2 % 2),
    )
    latency = StepLatency(Curve.line(0.01, 1e-5), context_token_s=1e-7)
    timed, stop_s = bool(seed // 4 % 2), math.inf if seed // 8 % 2 else float(rng.uniform(0.1, 9.0))

    def job(requests: int) -> EngineJob:
        arrival_s = np.round(rng.exponential(2.0, requests), 1) if timed else None
        lengths = rng.integers(1, 700, requests), rng.integers(1, 400, requests)
        w = Workload(*lengths, arrival_s=arrival_s)
        return EngineJob(config, w, latency, stop_s=stop_s, curve_points=(0, 2, 4, 64)[seed % 4])

    jobs = [job(int(n)) for n in rng.integers(1, 60, 6)]
    for mine, together in zip(jobs, simulate_engines(jobs), strict=True):
        alone = mine.run()
        for field in fields(alone):
            one, other = getattr(alone, field.name), getattr(together, field.name)
            if field.name == "curve" and one is not None:
                pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
            else:
                pairs = [(one, other)]
            assert all(np.array_equal(x, y) for x, y in pairs), field.name


def test_what_is_wrong_with_one_of_several_replicas_is_said() -> None:
    fine, long = workload((10, 3), (1, 1)), workload((10, 3), (3000, 1))
    config = EngineConfig(num_blocks=1000, max_model_len=2048)
    jobs = [EngineJob(config, w, SECOND) for w in (fine, long)]
    with pytest.raises(InputError, match="request 1: its prompt of 3000 tokens leaves no room"):
        simulate_engines(jobs)
    small = replace(config, num_blocks=10)
    jobs = [EngineJob(small, w, SECOND) for w in (fine, workload((10, 3), (900, 1)))]
    with pytest.raises(NeverFitsError, match="request 1 needs 57 KV-cache blocks"):
        simulate_engines(jobs)


def test_what_comes_after_a_sequence_that_preempts_itself() -> None:
    """Before vLLM 0.33 the step ended there; since then the sequences after it go on."""
    rng = np.random.default_rng(2)
    workload = Workload(
        rng.integers(1, 40, 60),
        rng.integers(1, 60, 60),
        priority=rng.integers(-1, 3, 60),
        arrival_step=rng.integers(0, 60, 60),
    )
    tight = EngineConfig(
        max_num_seqs=5, max_num_batched_tokens=16, num_blocks=8, scheduling_policy="priority"
    )
    runs = [
        simulate_engine(
            replace(tight, self_preemption_ends_step=ends),
            workload,
            StepLatency(Curve.constant(0.01)),
        )
        for ends in (True, False)
    ]
    assert runs[1].computed_tokens != runs[0].computed_tokens
    assert np.isfinite(runs[1].finish_s).all()


def test_of_equal_priorities_the_first_to_arrive_comes_first() -> None:
    """As vLLM orders them by arrival; a request freed by another arrives then."""
    one = EngineConfig(max_num_seqs=1, num_blocks=50, scheduling_policy="priority")
    workload = Workload(
        np.full(4, 5),
        np.full(4, 5),
        priority=np.ones(4, np.int64),
        arrival_s=np.array([0.03, 0.0, 0.01, 0.0]),
        release_index=np.array([3]),
        release_indptr=np.array([0, 0, 1, 1, 1]),
    )
    run = simulate_engine(one, workload, StepLatency(Curve.constant(0.01)))
    assert np.argsort(run.finish_s).tolist() == [1, 2, 0, 3]
