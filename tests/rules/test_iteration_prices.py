"""No engine computes a node's tokens in less than they cost, whatever comes when and is stopped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samullm_plugin.engine import Curve, EngineConfig, StepLatency, Workload, simulate_engine
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.kv_cache import KvCacheGroup
from samullm_plugin.rules.iteration_prices import Work, unit_prices, work_of
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.strategies import engine_options, step_latencies


@st.composite
def tiled(draw: st.DrawFn) -> StepLatency:
    """Return latencies by tiles of any widths and heights, beside every other term."""
    at, knots = 0, {}
    for width in draw(st.lists(st.integers(1, 40), min_size=1, max_size=6)):
        seconds = 0.001 * draw(st.integers(1, 120)) + 0.002 * at
        knots |= {at + 1.0: seconds, float(at + width): seconds}
        at += width
    curve = Curve(tuple(knots), tuple(knots.values()))
    return replace(draw(step_latencies()), by_tokens=curve)


def amounts_of(work: Work) -> np.ndarray:
    units = [work.prefill, work.context, work.requests, work.pairs, work.blocks]
    return np.concatenate([units, work.chains])


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_iterations_are_cheaper_than_their_tokens(data: st.DataObject) -> None:
    """Stopped at any moments and begun anew, under any priorities, with chains and preemption."""
    draw = data.draw
    n = draw(st.integers(1, 12))
    prompts = np.array(draw(st.lists(st.integers(1, 40), min_size=n, max_size=n)))
    outputs = np.array(draw(st.lists(st.integers(1, 24), min_size=n, max_size=n)))
    before = [draw(st.integers(-1, r - 1)) for r in range(n)] if draw(st.booleans()) else [-1] * n
    node = TestNode(
        "a",
        prompts.tolist(),
        outputs.tolist(),
        [[] if q < 0 else [(0, q)] for q in before],
        latency=draw(st.one_of(tiled(), step_latencies())),
        kv_cache_tokens=draw(st.sampled_from([64, 96, 4000])),
        max_model_len=64,
        engine=draw(engine_options()),
        prefix_tokens=draw(st.sampled_from([0, 20])),
        in_prompt=False,
    )
    problem = make_problem([node], 1, nvlink=1)
    costs = next(iter(problem.costs[0].values()))
    config = problem.engine_config(0, costs)
    priority = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    if draw(st.booleans()):
        config = replace(config, scheduling_policy="priority")
    generated, done, busy_s = np.zeros(n, np.int64), np.zeros(n, bool), 0.0
    while not done.all():
        left = np.flatnonzero(~done)
        place = {int(r): k for k, r in enumerate(left)}
        later = [[place[r] for r in range(n) if before[r] == q and not done[r]] for q in left]
        caching = config.enable_prefix_caching
        workload = Workload(
            prompts[left] + generated[left],
            outputs[left] - generated[left],
            priority=priority[left] if config.scheduling_policy == "priority" else None,
            prefix_id=np.zeros(len(left), np.int64) if caching else None,
            prefix_tokens=np.full(len(left), node.prefix_tokens) if caching else None,
            release_index=np.array([r for rows in later for r in rows], np.int64),
            release_indptr=np.concatenate([[0], np.cumsum([len(r) for r in later])]),
        )
        stop_s = draw(st.sampled_from([np.inf, np.inf, 0.3, 1.0, 3.0]))
        run = simulate_engine(config, workload, costs.latency, stop_s=stop_s)
        busy_s += run.busy_s
        generated[left] += run.generated_tokens
        done[left] = np.isfinite(run.finish_s)
    work = work_of(problem, problem.scenarios[0], 0)
    prices = unit_prices(1, costs.latency, config)
    assert float((prices @ amounts_of(work)).max()) <= busy_s * (1 + 1e-9) + 1e-9


FLAT = StepLatency(Curve((32.0, 33.0, 64.0), (1.0, 1.2, 7.4)))
"""Up to 32 tokens at the price of one."""


@pytest.mark.parametrize(
    ("prompts", "outputs", "seqs", "tokens", "stop_s", "context_s"),
    [
        ([8] * 6, [2] * 6, 1, 64, np.inf, 0.0),  # prompts in iterations that are cheap for them
        ([1, 200], [9, 1], 2, 32, np.inf, 0.0),  # a prompt in pieces beside decodes
        ([8], [24], 1, 64, 1.0, 0.01),  # computed anew instead of reading context
    ],
)
def test_what_prompts_save_is_counted_once_a_request(
    prompts: list[int],
    outputs: list[int],
    seqs: int,
    tokens: int,
    stop_s: float,
    context_s: float,
) -> None:
    """Prices come close to what it takes where few prompts are computed, and never above it."""
    engine = EngineOptions(max_num_seqs=seqs, max_num_batched_tokens=tokens, async_scheduling=False)
    latency = replace(FLAT, context_token_s=context_s)
    node = TestNode("a", prompts, outputs, latency=latency, engine=engine, max_model_len=256)
    problem = make_problem([node], 1, nvlink=1)
    config = problem.engine_config(0, next(iter(problem.costs[0].values())))
    left, done = np.array(outputs), np.array(prompts)
    busy_s = 0.0
    while (left > 0).any():
        open_ = np.flatnonzero(left > 0)
        run = simulate_engine(config, Workload(done[open_], left[open_]), latency, stop_s=stop_s)
        busy_s += run.busy_s
        left[open_] -= run.generated_tokens
        done[open_] += run.generated_tokens
    work = work_of(problem, problem.scenarios[0], 0)
    found = float((unit_prices(1, latency, config) @ amounts_of(work)).max())
    assert 0.45 * busy_s < found <= busy_s * (1 + 1e-9)


def test_prompts_are_not_divided_to_fill_what_is_cheap() -> None:
    """Long prompts beside few decodes: each takes an iteration of its own, not many small ones."""
    dear = StepLatency(Curve((1.0, 32.0, 33.0, 512.0), (1.0, 1.0, 2.0, 17.0)))
    engine = EngineOptions(max_num_seqs=1, max_num_batched_tokens=512, async_scheduling=False)
    node = TestNode("a", [320] * 4, [60] * 4, latency=dear, engine=engine, max_model_len=512)
    problem = make_problem([node], 1, nvlink=1)
    config = problem.engine_config(0, next(iter(problem.costs[0].values())))
    run = simulate_engine(config, Workload(np.full(4, 320), np.full(4, 60)), dear)
    work = work_of(problem, problem.scenarios[0], 0)
    found = float((unit_prices(1, dear, config) @ amounts_of(work)).max())
    assert 0.98 * run.busy_s < found <= run.busy_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("groups", "known"),
    [
        ((), True),
        ((KvCacheGroup("full"), KvCacheGroup("sliding_window", window_tokens=32)), True),
        ((KvCacheGroup("sliding_window", window_tokens=32),), False),
    ],
)
def test_the_cache_limits_what_holds_every_token(
    groups: tuple[KvCacheGroup, ...], known: bool
) -> None:
    """Layers with a window give blocks back: how many sequences they hold is not known."""
    config = EngineConfig(num_blocks=40, kv_cache_groups=groups)
    prices = unit_prices(1, StepLatency(Curve.line(1.0, 0.001)), config)
    assert bool((prices[:, 4] > 0.0).any()) == known


def test_sequences_hold_whole_blocks() -> None:
    """Lengths 17 to 20 hold two blocks of 16 each; decodes read 18, 19 and 20 tokens."""
    engine = EngineOptions(block_size=16)
    problem = make_problem([TestNode("a", [17], [4], engine=engine)], 1, nvlink=1)
    work = work_of(problem, problem.scenarios[0], 0)
    assert work.blocks == 4 * 32 - (18 + 19 + 20)
