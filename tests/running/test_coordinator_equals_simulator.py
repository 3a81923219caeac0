"""The coordinator on simulated engines does what the plan simulator says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from samullm_simulated.executor import SimulatedExecutor

from samullm_plugin.core.plan import Plan
from samullm_plugin.core.problem import Problem
from samullm_plugin.core.simulation import PlanSimulator
from samullm_plugin.services.running.imitation import run_imitated
from samullm_plugin.testing.strategies import plans, problems


def untaken_in_chains(problem: Problem) -> bool:
    """Whether a request waits for one of its own node that is not taken.

    The plan simulator takes such a chain for cut there; the coordinator learns that a request is
    not taken only when its own inputs are settled.
    """
    for i, node in enumerate(problem.app.nodes):
        table = node.requests
        own = table.input_node == i
        if (problem.scenarios[0].output_tokens[i][table.input_request[own]] == 0).any():
            return True
    return False


def assert_equal(problem: Problem, plan: Plan) -> None:
    trace = PlanSimulator(problem).simulate_scenario(plan, 0)
    coordinator = run_imitated(problem, plan, SimulatedExecutor(), problem)
    ledger = coordinator.ledger
    assert ledger.all_settled
    for i, finish_s in enumerate(trace.finish_s):
        np.testing.assert_allclose(
            ledger.finish_s[i], finish_s, rtol=1e-9, atol=1e-9, err_msg=problem.app.nodes[i].name
        )
        np.testing.assert_array_equal(ledger.generated[i], problem.scenarios[0].output_tokens[i])
    stages = [r for r in coordinator.log.records if r["kind"] == "stage"]
    np.testing.assert_allclose([r["time_s"] for r in stages], trace.stage_start_s, atol=1e-9)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_random_problems(data: st.DataObject) -> None:
    problem = data.draw(problems())
    assume(not untaken_in_chains(problem))
    plan = data.draw(plans(problem))
    assert_equal(problem, plan)
