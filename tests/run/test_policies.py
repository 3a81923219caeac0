"""Request policies mean the same to the coordinator's engines as to the plan simulator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin import Assignment, ParallelConfig, Plan, RequestPolicy, Stage
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

    from samullm_plugin.model.application import EngineOptions

    node = TestNode("a", [4] * 6, [30, 3, 20, 5, 40, 8], engine=EngineOptions(max_num_seqs=1))
    problem = make_problem([node], 1)
    plan = Plan((Stage((Assignment("a", ParallelConfig(1, 1, 1), (0,)),)),))
    policy = policies.LongestFirst() if longest_first else policies.ShortestFirst()
    call = policy_call(problem.app, policy, problem.scenarios)
    coordinator = run_with_truth(problem, plan, SimulatedExecutor(), problem, policy=call)
    order = np.argsort(coordinator.ledger.finish_s[0]).tolist()
    by_length = [1, 3, 5, 2, 0, 4]
    assert order == (by_length[::-1] if longest_first else by_length)
