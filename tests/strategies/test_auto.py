"""The default scheduler: never worse than its starts, on time, and explained."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from time import monotonic, process_time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from samullm_auto import budget, neighbourhood
from samullm_auto.plugin import AutoOptions, AutoScheduler
from samullm_auto.risk import Risk, RiskMeasure

from samullm_plugin import PluginHost
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.result import PlanStatus
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.planning.policies import policy_call
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.strategies import problems

OTHERS = ("greedy", "max-heuristic", "min-heuristic")


@pytest.fixture(scope="module")
def host() -> PluginHost:
    return PluginHost()


def serial(name: str, requests: int, output: int, **more: object) -> TestNode:
    engine = EngineOptions(max_num_seqs=1, async_scheduling=False)
    outputs = [output] * requests
    return TestNode(name, [4] * requests, outputs, engine=engine, **more)  # type: ignore[arg-type]


def puzzle() -> Problem:
    """Five models on four GPUs that no heuristic packs well."""
    work = ((8, 30), (6, 25), (9, 20), (4, 33), (5, 14))
    return make_problem([serial(f"m{i}", n, o) for i, (n, o) in enumerate(work)], num_gpus=4)


def context_of(problem: Problem, **more: object) -> SchedulingContext:
    return SchedulingContext(PlanSimulator(problem), np.random.default_rng(0), **more)  # type: ignore[arg-type]


def test_better_than_the_heuristics_where_there_is_something_to_gain(host: PluginHost) -> None:
    problem = puzzle()
    auto = make_plan(host, problem, "auto")
    others = {name: make_plan(host, problem, name).mean_makespan_s for name in OTHERS}
    assert auto.mean_makespan_s < min(others.values())
    assert set(dict(auto.explanation)) == {n.name for n in problem.app.nodes}
    assert "GPUs" in dict(auto.explanation)["m0"]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(max_scenarios=2))
def test_never_worse_than_its_starts(host: PluginHost, problem: Problem) -> None:
    simulator = PlanSimulator(problem)
    auto = make_plan(host, problem, "auto", simulator=simulator)
    starts = [
        make_plan(host, problem, name, simulator=simulator)
        for name in ("max-heuristic", "min-heuristic", "exact")
    ]
    assert verify(problem, auto.plan) == ()
    assert auto.mean_makespan_s <= min(s.mean_makespan_s for s in starts) * (1 + 1e-9)
    assert (auto.lower_bound_s <= auto.makespan_s * (1 + 1e-9)).all()


def test_an_incumbent_is_kept_unless_beaten(host: PluginHost) -> None:
    problem = puzzle()
    best = make_plan(host, problem, "auto", PlanningOptions(options={"budget_s": 2.0}))
    how = PlanningOptions(options={"budget_s": 0.05}, incumbent=best.plan)
    again = make_plan(host, problem, "auto", how)
    assert again.mean_makespan_s <= best.mean_makespan_s


def test_no_other_scheduler_is_needed() -> None:
    problem = puzzle()

    def nobody(
        name: str,
        /,
        *,
        options: Mapping[str, object] | None = None,
        budget_s: float | None = None,
        give_up_s: float | None = None,
        scenarios: int | None = None,
    ) -> Plan:
        raise InputError(f"unknown scheduler {name}")

    for schedule_with in (None, nobody):
        context = context_of(problem, schedule_with=schedule_with)
        plan = AutoScheduler(AutoOptions(budget_s=0.5)).schedule(problem, context)
        assert verify(problem, plan) == ()


def test_the_deadline_of_the_context_holds() -> None:
    problem, began = puzzle(), process_time()
    context = context_of(problem, deadline_s=monotonic() + 0.3)
    AutoScheduler(AutoOptions(budget_s=60.0)).schedule(problem, context)
    assert process_time() - began < 5.0  # of the processor: other work on the machine is not its


def test_it_stops_where_bound_and_incumbent_meet() -> None:
    chain = TestNode("a", [4] * 3, [5, 6, 7], [[], [(0, 0)], [(0, 1)]], step_s=2.0)
    problem = make_problem([chain], num_gpus=1, nvlink=1)
    began = process_time()
    context = context_of(problem)
    AutoScheduler(AutoOptions(budget_s=30.0)).schedule(problem, context)
    assert context.report.status is PlanStatus.OPTIMAL
    assert process_time() - began < 10.0


def test_progress_is_reported() -> None:
    problem, seen = puzzle(), []
    context = context_of(problem, progress=lambda bound, value: seen.append((bound, value)))
    AutoScheduler(AutoOptions(budget_s=0.5)).schedule(problem, context)
    values = [v for _, v in seen]
    assert values == sorted(values, reverse=True)
    assert all(b is not None and v is not None and b <= v for b, v in seen)


def test_risk_measures() -> None:
    makespans = np.array([10.0, 20.0, 30.0, 100.0])
    assert Risk("mean").of(makespans) == 40
    assert Risk("quantile", 0.5).of(makespans) == 30
    assert Risk("cvar", 0.75).of(makespans) == 100
    assert Risk("cvar", 0.5).of(makespans) == 65
    assert Risk("cvar", 0.6).of(makespans) == pytest.approx((100 + 0.6 * 30) / 1.6)


def test_risk_changes_the_plan() -> None:
    """A model that is long in one scenario of two gets more GPUs where the worst case counts."""
    engine = EngineOptions(max_num_seqs=1, async_scheduling=False)
    risky = TestNode("risky", [4] * 4, [[5] * 4, [60] * 4], engine=engine)
    steady = TestNode("steady", [4] * 4, [[30] * 4, [30] * 4], engine=engine)
    problem = make_problem([risky, steady], num_gpus=4, nvlink=1, num_scenarios=2)
    worst = {}
    for risk in ("mean", "cvar"):
        options = AutoOptions(budget_s=1.0, risk=risk, level=0.5)  # type: ignore[arg-type]
        context = context_of(problem)
        plan = AutoScheduler(options).schedule(problem, context)
        worst[risk] = max(t.makespan_s for t in context.simulate(plan))
    assert worst["cvar"] <= worst["mean"]


@pytest.mark.parametrize(("risk", "level"), [("mean", 0.9), ("quantile", 0.5), ("cvar", 0.6)])
def test_no_simple_plan_has_a_smaller_risk(risk: RiskMeasure, level: float) -> None:
    """Brute force: both at once, each alone after the other, one resized when the other ends."""
    engine = EngineOptions(max_num_seqs=1, async_scheduling=False)
    outputs = [[5] * 4, [60] * 4, [90] * 4, [20] * 4]
    risky = TestNode("risky", [4] * 4, outputs, engine=engine, load_s=9.0)
    steady = TestNode("steady", [4] * 5, [[30] * 5] * 4, engine=engine, load_s=9.0)
    problem = make_problem([risky, steady], num_gpus=2, nvlink=1, num_scenarios=4)
    one, two = ParallelConfig(1), ParallelConfig(2)

    def on(name: str, *devices: int) -> Assignment:
        return Assignment(name, one if len(devices) == 1 else two, devices)

    beside = Stage((on("risky", 0), on("steady", 1)))
    plans = [Plan((beside,))]
    plans += [Plan((beside, Stage((on(n, 0, 1),)))) for n in ("risky", "steady")]
    plans += [
        Plan((Stage((on(a, *range(i)),)), Stage((on(b, *range(j)),))))
        for a, b in (("risky", "steady"), ("steady", "risky"))
        for i in (1, 2)
        for j in (1, 2)
    ]
    context = context_of(problem)
    judged = Risk(risk, level)

    def value_s(plan: Plan) -> float:
        return judged.of(np.array([t.makespan_s for t in context.simulate(plan)]))

    found = AutoScheduler(AutoOptions(budget_s=1.0, risk=risk, level=level)).schedule(
        problem, context
    )
    assert value_s(found) <= min(map(value_s, plans)) * (1 + 1e-9)


def test_a_seed_gives_one_plan_however_slow_the_machine(
    host: PluginHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work is counted: a clock that runs ten times as fast changes nothing."""
    problem = puzzle()
    calm = make_plan(host, problem, "auto")
    real = time.monotonic
    for module in (budget, neighbourhood):
        monkeypatch.setattr(module, "monotonic", lambda: 10.0 * real())
    busy = make_plan(host, problem, "auto")
    assert busy.plan == calm.plan
    assert not any("time limit" in note for note in calm.notes)


def test_what_is_left_out_is_noted(host: PluginHost) -> None:
    how = PlanningOptions(options={"exact_up_to": 0})
    notes = make_plan(host, puzzle(), "auto", how).notes
    assert any(n.startswith("exact was left out") for n in notes)


def test_very_many_requests_are_planned_on_a_part_and_confirmed(host: PluginHost) -> None:
    rng = np.random.default_rng(3)
    engine = EngineOptions(async_scheduling=False)
    nodes = [
        TestNode(
            name,
            rng.integers(20, 200, 25_000).tolist(),
            np.ceil(rng.lognormal(3.0, 0.7, 25_000)).astype(int).clip(1, 400).tolist(),
            step_s=step_s,
            token_s=0.0002,
            engine=engine,
        )
        for name, step_s in (("a", 0.02), ("b", 0.03), ("c", 0.01))
    ]
    problem = make_problem(nodes, num_gpus=8)
    simulator = PlanSimulator(problem)
    auto = make_plan(host, problem, "auto", simulator=simulator)
    others = [make_plan(host, problem, n, simulator=simulator).mean_makespan_s for n in OTHERS]
    assert auto.mean_makespan_s <= 1.001 * min(others)
    assert any("requests" in note for note in auto.notes)


def documents(longest: int, *, others: int = 24) -> Problem:
    """One document of many parts and others of three, four at a time on each of two GPUs."""
    sizes = [longest, *[3] * others]
    last: dict[int, int] = {}
    inputs: list[list[tuple[int, int]]] = []
    for k in range(longest):
        for document in [d for d, size in enumerate(sizes) if size > k]:
            inputs.append([(0, last[document])] if k else [])
            last[document] = len(inputs) - 1
    n, engine = len(inputs), EngineOptions(max_num_seqs=4)
    return make_problem([TestNode("read", [4] * n, [20] * n, inputs, engine=engine)], num_gpus=2)


def test_a_request_policy_is_chosen_where_it_pays(host: PluginHost) -> None:
    problem, offered = documents(12), PlanningOptions(policies=("isolate-longest",))
    without, found = make_plan(host, problem, "auto"), make_plan(host, problem, "auto", offered)
    assert without.request_policy is None
    assert found.request_policy == "isolate-longest"
    assert found.mean_makespan_s < 0.99 * without.mean_makespan_s
    assert found.mean_makespan_s >= found.lower_bound_s[0]
    assert any("request policy isolate-longest" in note for note in found.notes)
    policy = policy_call(
        problem.app, host.create("request-policy", "isolate-longest"), problem.scenarios
    )
    again = PlanSimulator(problem, policy=policy).simulate_scenario(found.plan, 0)
    assert found.makespan_s.tolist() == [again.makespan_s]
    assert f"to {again.makespan_s:.0f} s" in dict(found.explanation)["read"]


def with_stages(problem: Problem, share: float) -> Problem:
    """Return the problem with replicas of two pipeline stages that take a share of an iteration."""
    costs = []
    for sizes in problem.costs:
        one = sizes[ModeKey("test-gpu", 1)]
        two = replace(one, latency=one.latency.scaled(share))
        costs.append({**sizes, ModeKey("test-gpu", 1, 2): two})
    return replace(problem, costs=tuple(costs))


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_more_to_choose_from_is_never_worse(host: PluginHost, share: float) -> None:
    """Pipeline stages and a request policy together are as good as each of them alone."""
    offered = PlanningOptions(policies=("isolate-longest",))
    for problem in (documents(12), puzzle()):
        larger = with_stages(problem, share)
        stages = make_plan(host, larger, "auto")
        policy = make_plan(host, problem, "auto", offered)
        both = make_plan(host, larger, "auto", offered)
        least_s = min(stages.makespan_s[0], policy.makespan_s[0])
        assert both.makespan_s[0] <= least_s * (1 + 1e-9)
        assert stages.makespan_s[0] <= make_plan(host, problem, "auto").makespan_s[0] * (1 + 1e-9)
    limited = PlanningOptions(options={"budget_s": 0.5})
    assert verify(larger, make_plan(host, larger, "auto", limited).plan) == ()


def test_no_request_policy_is_chosen_where_it_saves_nothing(host: PluginHost) -> None:
    offered = PlanningOptions(policies=("isolate-longest",))
    for problem in (documents(3), puzzle()):
        found = make_plan(host, problem, "auto", offered)
        assert found.request_policy is None
        assert found.makespan_s.tolist() == make_plan(host, problem, "auto").makespan_s.tolist()
    assert make_plan(host, documents(12), "greedy", offered).request_policy is None
