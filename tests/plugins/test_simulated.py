"""The simulated executor: its contract, and whatever it is given in whatever order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin import EngineRequest, EngineSpec, ParallelConfig, Problem, RunError
from samullm_plugin.engine import Workload, simulate_engine
from samullm_plugin.testing.executor_contract import ExecutorContract
from samullm_plugin.testing.factories import TestNode, make_problem


class TestSimulated(ExecutorContract):
    executor_class = SimulatedExecutor


def opened(problem: Problem) -> SimulatedExecutor:
    executor = SimulatedExecutor()
    executor.imitate(problem)
    executor.open(problem.cluster, None)
    return executor


def engine_spec(problem: Problem, key: str, device: int, node: int = 0) -> EngineSpec:
    costs = problem.mode(node, ParallelConfig(), (device,))
    model = problem.app.nodes[node].model
    return EngineSpec(key, node, model, (device,), 1, 1, costs.kv_cache_tokens)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_submissions_nobody_foresaw(data: st.DataObject) -> None:
    """Requests of a chain, given at times and in an order of the caller's own.

    What comes out equals one simulation with these arrivals: nothing that was foreseen and did not
    happen leaves a trace, and later arrivals do not change what happened earlier.
    """
    n = data.draw(st.integers(1, 8))
    outputs = data.draw(st.lists(st.integers(1, 12), min_size=n, max_size=n))
    waits = [[(0, r - 1)] if r and data.draw(st.booleans()) else [] for r in range(n)]
    node = TestNode("a", [5] * n, outputs, waits, step_s=0.1, load_s=1.0, in_prompt=False)
    problem = make_problem([node], 1)
    executor = opened(problem)
    executor.start_engine(engine_spec(problem, "a", 0))
    order = data.draw(st.permutations(range(n)))
    pauses = data.draw(st.lists(st.sampled_from([0.0, 0.13, 0.7]), min_size=n, max_size=n))
    finished: dict[int, float] = {}

    def listen(until_s: float) -> None:
        while executor.now_s() < until_s:
            for event in executor.poll(until_s - executor.now_s()):
                finished.update((o.request, event.time_s) for o in event.outputs)

    listen(1.0)
    arrivals = np.zeros(n)
    for position, r in enumerate(order):
        listen(executor.now_s() + pauses[position])
        arrivals[position] = executor.now_s() - 1.0
        executor.submit("a", [EngineRequest(r, None, 5, 4000)])
    while len(finished) < n:
        events = executor.poll(float("inf"))
        assert events
        for event in events:
            finished.update((o.request, event.time_s) for o in event.outputs)
    costs = problem.mode(0, ParallelConfig(), (0,))
    lengths = np.array([outputs[r] for r in order])
    expected = simulate_engine(
        problem.engine_config(0, costs),
        Workload(np.full(n, 5), lengths, arrival_s=arrivals),
        costs.latency,
    )
    for position, r in enumerate(order):
        # an arrival between two iterations may be a rounding error to this or that side of one
        assert finished[r] == pytest.approx(1.0 + expected.finish_s[position], abs=0.1 + 1e-9)


def test_stopping_keeps_whole_iterations() -> None:
    problem = make_problem([TestNode("a", [4, 4], [10, 3], step_s=1.0, load_s=2.0)], 1)
    executor = opened(problem)
    executor.start_engine(engine_spec(problem, "a", 0))
    executor.submit("a", [EngineRequest(0, None, 4, 100), EngineRequest(1, None, 4, 100)])
    assert [e.kind for e in executor.poll(100.0)] == ["ready"]
    (event,) = executor.poll(100.0)
    assert (event.time_s, [o.request for o in event.outputs]) == (5.0, [1])
    executor.poll(1.5)
    assert executor.now_s() == 6.5
    assert executor.progress("a") == {0: 4}
    steps = executor.take_steps("a")
    assert steps is not None
    assert steps[1].tolist() == [1.0] * 4
    (rest,) = executor.stop_engine("a")
    assert (rest.request, rest.num_tokens, rest.finish_reason) == (0, 4, None)
    # elsewhere it goes on with what it has: 6 tokens are left
    executor.start_engine(engine_spec(problem, "b", 0))
    executor.submit("b", [EngineRequest(0, None, 8, 96, num_generated=4)])
    executor.poll(100.0)
    (event,) = executor.poll(100.0)
    assert (event.time_s, event.outputs[0].num_tokens) == (6.5 + 2.0 + 6.0, 6)


def test_limits_and_prompts_that_are_too_long() -> None:
    problem = make_problem(
        [TestNode("a", [4, 4], [10, 3], step_s=1.0, load_s=0.0, max_model_len=64)], 1
    )
    executor = opened(problem)
    executor.start_engine(engine_spec(problem, "a", 0))
    executor.submit("a", [EngineRequest(0, None, 4, 5), EngineRequest(1, None, 64, 5)])
    outputs = {}
    while len(outputs) < 2:
        outputs |= {o.request: o for e in executor.poll(100.0) for o in e.outputs}
    assert (outputs[0].num_tokens, outputs[0].finish_reason) == (5, "length")
    assert outputs[1].finish_reason == "error"
    assert "max_model_len 64" in str(outputs[1].error)


def test_devices_are_held() -> None:
    problem = make_problem([TestNode("a", [4], [10]), TestNode("b", [4], [10])], 1)
    executor = opened(problem)
    executor.start_engine(engine_spec(problem, "a", 0))
    with pytest.raises(RunError, match="device 0 of b is held by a"):
        executor.start_engine(engine_spec(problem, "b", 0, node=1))
