"""The coordinator on simulated engines does what the plan simulator says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samullm_simulated.engine import SimulatedEngine
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.bench.cases import CaseSettings, make_case
from samullm_plugin.engine import EngineCache
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.scenarios import make_scenario
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.planning.policies import policy_call
from samullm_plugin.rules.bounds import lower_bound
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.simulator.runs import PolicyCall
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.strategies import plans, problems
from tests.run.worlds import run_with_truth, small_plan, small_problem


def consistent(problem: Problem) -> Problem:
    """Take no request whose inputs are all left out."""
    app, scenario = problem.app, problem.scenarios[0]
    taken = [o > 0 for o in scenario.output_tokens]
    for i in app.order:
        table = app.nodes[i].requests
        for r in range(len(table)):
            part = slice(table.input_indptr[r], table.input_indptr[r + 1])
            inputs = list(zip(table.input_node[part], table.input_request[part], strict=True))
            if inputs:
                taken[i][r] &= any(taken[s][q] for s, q in inputs)
    outputs = [np.maximum(o, 1) for o in scenario.output_tokens]
    return problem.with_scenarios((make_scenario(app, outputs, taken),))


def assert_equal(
    problem: Problem,
    plan: Plan,
    policy: PolicyCall | None = None,
    executor: SimulatedExecutor | None = None,
) -> None:
    trace = PlanSimulator(problem, policy=policy).simulate_scenario(plan, 0)
    coordinator = run_with_truth(
        problem, plan, executor or SimulatedExecutor(), problem, policy=policy
    )
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
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_random_problems(data: st.DataObject) -> None:
    problem = consistent(data.draw(problems()))
    plan = data.draw(plans(problem))
    assert_equal(problem, plan)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_cold_page_caches_of_one_and_two_machines(data: st.DataObject) -> None:
    """Every machine reads each checkpoint once, ahead if it can, one after another."""
    problem = consistent(data.draw(problems()))
    cluster = problem.cluster
    groups = cluster.nvlink_groups
    if len(groups) > 1 and data.draw(st.booleans()):
        machines = (groups[0], tuple(d for g in groups[1:] for d in g))
        cluster = Cluster(cluster.gpus, groups, machines, cluster.host_memory_bytes)
    problem = replace(problem, cluster=cluster, page_cache="cold")
    plan = data.draw(plans(problem))
    bound_s = lower_bound(problem, problem.scenarios[0]).value_s
    trace = PlanSimulator(problem).simulate_scenario(plan, 0)
    assert bound_s <= trace.makespan_s * (1 + 1e-9)
    if not any(  # replicas on several machines are planned to be ready together
        len({cluster.machine_of(d) for d in a.devices}) > 1
        for s in plan.stages
        for a in s.assignments
    ):
        assert_equal(problem, plan)


@pytest.mark.parametrize(
    "application",
    [
        "ensembling:requests=1000,max_tokens=256",
        "routing",
        "chain-summary:documents=100,judges=4",
        "map-reduce",
        "filter-vote",
    ],
)
def test_bundled_applications(application: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 9,000 requests."""
    host = PluginHost.from_settings()
    problem = make_case(host, application, CaseSettings(seeds=0)).problem
    plan = make_plan(host, problem, "min-heuristic").plan
    simulated = 0
    simulate = SimulatedEngine.simulate

    def counted(engine: SimulatedEngine, cache: EngineCache) -> None:
        nonlocal simulated
        simulated += len(engine.submitted) + len(engine.foreseen)
        simulate(engine, cache)

    monkeypatch.setattr(SimulatedEngine, "simulate", counted)
    assert_equal(problem, plan)
    requests = sum(len(n.requests) for n in problem.app.nodes)
    assert simulated <= 1.5 * requests  # what is foreseen comes, and is not simulated again


@pytest.mark.parametrize("name", ["longest-first", "shortest-first"])
def test_request_policies(name: str) -> None:
    """Order and replicas are the policy's, in the simulation and in the run alike."""
    host = PluginHost.from_settings()
    problem = make_case(host, "small-1", CaseSettings(seeds=0)).problem
    plan = make_plan(host, problem, "min-heuristic").plan
    policy = policy_call(problem.app, host.create("request-policy", name), problem.scenarios)
    assert_equal(problem, plan, policy)
    first = PlanSimulator(problem).simulate_scenario(plan, 0)
    other = PlanSimulator(problem, policy=policy).simulate_scenario(plan, 0)
    assert any((a != b).any() for a, b in zip(first.finish_s, other.finish_s, strict=True))


def test_what_two_engines_free_at_one_moment_comes_in_one_order() -> None:
    """Requests that come at one moment do so a rounding error apart, equally in both."""
    one_at_a_time = EngineOptions(max_num_seqs=1, async_scheduling=False)
    problem = make_problem(
        [
            TestNode("first", [1], [30], step_s=0.05, load_s=3.0),
            TestNode(
                "second",
                [1, 1, 1],
                [26, 1, 5],
                inputs=[[], [(1, 0)], [(0, 0)]],
                step_s=0.05,
                load_s=3.2,
                engine=one_at_a_time,
            ),
        ]
    )
    one = ParallelConfig(1, 1)
    stage = Stage((Assignment("first", one, (0,)), Assignment("second", one, (1,))))
    trace = PlanSimulator(problem).simulate_scenario(Plan((stage,)), 0)
    assert trace.finish_s[0][0] == trace.finish_s[1][0]
    assert_equal(problem, Plan((stage,)))


@pytest.mark.parametrize("name", ["longest-first", "shortest-first", "multi-bin", "program-age"])
def test_policies_know_in_plans_what_they_know_in_runs(name: str) -> None:
    """Many equal lengths, whose order arrivals decide, in chains and behind other nodes."""
    problem, plan = small_problem(n=300), small_plan()
    policy = PluginHost.from_settings().create("request-policy", name)
    assert_equal(problem, plan, policy_call(problem.app, policy, problem.scenarios))


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_isolated_chains_are_isolated_alike(share: float) -> None:
    """Also of what is left when their engines move; and other chains than in turn."""
    rng = np.random.default_rng(5)
    sizes = rng.geometric(0.2, 24)
    last: dict[int, int] = {}
    inputs: list[list[tuple[int, int]]] = []
    for k in range(int(sizes.max())):
        for c in np.flatnonzero(sizes > k).tolist():
            inputs.append([(0, last[c])] if k else [])
            last[c] = len(inputs) - 1
    n, few = len(inputs), EngineOptions(max_num_seqs=3)
    lengths = [int(v) for v in rng.integers(1, 30, n)]
    judged = [[(0, last[c])] for c in range(24)]
    problem = make_problem(
        [
            TestNode("chain", [6] * n, lengths, inputs, step_s=0.08, load_s=1.0, engine=few),
            TestNode("judge", [9] * 24, [5] * 24, judged, step_s=0.06, load_s=1.5),
        ],
        4,
        nvlink=1,
    )
    three, two, one = ParallelConfig(3), ParallelConfig(2), ParallelConfig()
    halfway = StageEnd("node_progress", "chain", 0.4)
    plan = Plan(
        (
            Stage((Assignment("chain", three, (0, 1, 2)),), halfway),
            Stage((Assignment("chain", two, (0, 1)), Assignment("judge", one, (3,)))),
        )
    )
    host = PluginHost.from_settings()
    chosen = host.create("request-policy", "isolate-longest", {"share": share})
    policy = policy_call(problem.app, chosen, problem.scenarios)
    assert_equal(problem, plan, policy)
    first = PlanSimulator(problem).simulate_scenario(plan, 0)
    other = PlanSimulator(problem, policy=policy).simulate_scenario(plan, 0)
    assert (first.finish_s[0] != other.finish_s[0]).any()
