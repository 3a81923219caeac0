"""The coordinator on simulated engines does what the plan simulator says."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samullm_simulated.executor import SimulatedExecutor

from samullm_plugin.core.plan import Plan
from samullm_plugin.core.problem import Problem
from samullm_plugin.core.scenarios import make_scenario
from samullm_plugin.core.simulation import PlanSimulator
from samullm_plugin.services.running.imitation import run_imitated
from samullm_plugin.testing.strategies import plans, problems


def consistent(problem: Problem) -> Problem:
    """Take no request whose inputs are all left out, and leave out none in nodes with chains.

    When a request of a chain that is not taken counts as settled differs: the plan simulator does
    not look at its predecessors, the coordinator decides when they are settled.
    """
    app, scenario = problem.app, problem.scenarios[0]
    taken = [o > 0 for o in scenario.output_tokens]
    for i in app.order:
        table = app.nodes[i].requests
        for r in range(len(table)):
            part = slice(table.input_indptr[r], table.input_indptr[r + 1])
            inputs = list(zip(table.input_node[part], table.input_request[part], strict=True))
            if inputs:
                taken[i][r] &= any(taken[s][q] for s, q in inputs)
        if (table.input_node == i).any() and not taken[i].all():
            taken = [np.ones_like(t) for t in taken]
            break
    outputs = [np.maximum(o, 1) for o in scenario.output_tokens]
    return problem.with_scenarios((make_scenario(app, outputs, taken),))


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
    problem = consistent(data.draw(problems()))
    plan = data.draw(plans(problem))
    assert_equal(problem, plan)
