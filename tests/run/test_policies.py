"""Request policies mean the same to the coordinator's engines as to the plan simulator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin import Assignment, ParallelConfig, Plan, RequestPolicy, Stage
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.plan import StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.planning.policies import policy_call
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.strategies import plans, problems
from tests.run.test_coordinator_equals_simulator import consistent
from tests.run.worlds import run_with_truth


class ByPrompt(RequestPolicy):
    """Long prompts first, replicas by length: it does not look at arrivals."""

    name = "by-prompt"

    def assign(self, batch, num_replicas):
        return -batch.prompt_tokens, batch.prompt_tokens % num_replicas


class OnlySpreads(ByPrompt):
    """Replicas in turn, the shortest predicted output first."""

    def assign(self, batch, num_replicas):
        return batch.predicted_tokens, None


SHIPPED = (
    "fcfs",
    "isolate-longest",
    "longest-first",
    "multi-bin",
    "program-age",
    "shortest-first",
)


def chained(rng: np.random.Generator) -> tuple[Problem, Plan]:
    """Return chains that join, whose requests often end together and wait for others as well."""
    n, behind = int(rng.integers(3, 16)), bool(rng.integers(2))
    few = EngineOptions(
        max_num_seqs=int(rng.integers(1, 5)),
        max_num_batched_tokens=int(rng.choice([16, 64])),
        block_size=4,
        async_scheduling=bool(rng.integers(2)),
    )

    def node(name: str, inputs: list[list[tuple[int, int]]], prompts: list[int]) -> TestNode:
        return TestNode(
            name,
            prompts,
            rng.choice([1, 2, 3, 6], n).tolist(),
            inputs,
            step_s=float(rng.choice([0.05, 0.07])),
            load_s=float(rng.integers(0, 3)),
            kv_cache_tokens=int(rng.choice([100, 4000])),
            max_model_len=96,
            engine=few,
        )

    inputs: list[list[tuple[int, int]]] = []
    for r in range(n):
        others = [(0, int(rng.integers(n)))] if behind and rng.integers(2) else []
        before = rng.choice(r, min(r, int(rng.integers(3))), replace=False).tolist() if r else []
        inputs.append(others + [(int(behind), q) for q in sorted(before)])
    nodes = [node("first", [[] for _ in range(n)], [3] * n)] if behind else []
    nodes.append(node("chain", inputs, rng.integers(1, 20, n).tolist()))
    replicas, one = int(rng.integers(1, 3)), ParallelConfig()
    first = (Assignment("first", one, (0,)),) if behind else ()
    devices = tuple(range(1, 1 + replicas))
    stages = [Stage((*first, Assignment("chain", ParallelConfig(replicas), devices)))]
    if rng.integers(3) == 0:
        stages[0] = Stage(stages[0].assignments, StageEnd("node_progress", "chain", 0.4))
        stages.append(Stage((*first, Assignment("chain", ParallelConfig(2), (2, 3)))))
    return make_problem(nodes, 4, nvlink=1), Plan(tuple(stages))


@pytest.mark.parametrize("policy", [ByPrompt, OnlySpreads, *SHIPPED])
def test_what_becomes_ready_at_one_moment(policy: type[RequestPolicy] | str) -> None:
    """By ends of one iteration, by other nodes at the same moment, or both."""
    host = PluginHost.from_settings()
    for number in range(100):
        problem, plan = chained(np.random.default_rng(number))
        chosen = host.create("request-policy", policy) if isinstance(policy, str) else policy()
        call = policy_call(problem.app, chosen, problem.scenarios)
        trace = PlanSimulator(problem, policy=call).simulate_scenario(plan, 0)
        ledger = run_with_truth(problem, plan, SimulatedExecutor(), problem, policy=call).ledger
        for i, finish_s in enumerate(trace.finish_s):
            np.testing.assert_allclose(
                ledger.finish_s[i], finish_s, rtol=1e-9, atol=1e-9, err_msg=f"number {number}"
            )


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data(), st.sampled_from([ByPrompt, OnlySpreads]))
def test_random_problems(data, policy) -> None:
    problem = consistent(data.draw(problems()))
    plan = data.draw(plans(problem))
    call = policy_call(problem.app, policy(), problem.scenarios)
    trace = PlanSimulator(problem, policy=call).simulate_scenario(plan, 0)
    ledger = run_with_truth(problem, plan, SimulatedExecutor(), problem, policy=call).ledger
    assert ledger.all_settled
    for i, finish_s in enumerate(trace.finish_s):
        np.testing.assert_allclose(ledger.finish_s[i], finish_s, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("longest_first", [False, True])
def test_priorities_decide_who_runs_first(longest_first) -> None:
    from samullm_policies import plugin as policies

    node = TestNode("a", [4] * 6, [30, 3, 20, 5, 40, 8], engine=EngineOptions(max_num_seqs=1))
    problem = make_problem([node], 1)
    plan = Plan((Stage((Assignment("a", ParallelConfig(1, 1, 1), (0,)),)),))
    policy = policies.LongestFirst() if longest_first else policies.ShortestFirst()
    call = policy_call(problem.app, policy, problem.scenarios)
    coordinator = run_with_truth(problem, plan, SimulatedExecutor(), problem, policy=call)
    order = np.argsort(coordinator.ledger.finish_s[0]).tolist()
    by_length = [1, 3, 5, 2, 0, 4]
    assert order == (by_length[::-1] if longest_first else by_length)
