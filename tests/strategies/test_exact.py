"""The scheduler ``exact`` as the host calls it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from samullm_cpsat.durations import measure
from samullm_cpsat.options import ExactOptions
from samullm_cpsat.plugin import Exact
from samullm_cpsat.schedule import by_weight, list_schedule
from samullm_cpsat.stages import plan_of

from samullm_plugin.engine import StepLatency
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.result import PlanStatus
from samullm_plugin.rules.bounds import lower_bound
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.scheduler_contract import SchedulerContract
from samullm_plugin.testing.strategies import problems


class TestNoSwitching(SchedulerContract):
    scheduler_class = Exact
    options = {"workers": 1}


class TestSegments(SchedulerContract):
    scheduler_class = Exact
    options = {"structure": "segments", "workers": 1, "ticks": 200, "deterministic_limit": 2.0}


def plan_with(problem: Problem, **options: object) -> tuple[Plan, SchedulingContext]:
    context = SchedulingContext(PlanSimulator(problem), np.random.default_rng(0))
    config = ExactOptions.model_validate({"workers": 1, **options})
    plan = Exact(config).schedule(problem, context)
    assert verify(problem, plan) == ()
    return plan, context


def five_models(num_gpus: int = 4) -> Problem:
    """Independent models of unequal work, all with tensor-parallel sizes 1 and 2."""
    nodes = [
        TestNode(f"n{i}", [10] * (20 + 13 * i), [20 + 3 * i] * (20 + 13 * i), sizes=(1, 2))
        for i in range(5)
    ]
    return make_problem(nodes, num_gpus)


def test_optimum_by_hand() -> None:
    """Three models of 14 s on one GPU (10 s to load, 4 iterations), 12 s on two; two GPUs.

    Two beside each other and one after them on both: 14 + 12 s. All on both: 36 s.
    """
    nodes = [TestNode(n, [4] * 2, [2] * 2, engine=one_by_one()) for n in "abc"]
    problem = make_problem(nodes, 2)
    plan, context = plan_with(problem)
    assert context.report.status is PlanStatus.OPTIMAL
    assert context.report.objective_s == pytest.approx(26.0, abs=0.01)
    assert context.mean_makespan_s(plan) == pytest.approx(26.0)
    assert sorted(a.parallel.num_devices for a in plan.stages[0].assignments) == [1, 1]


def one_by_one() -> EngineOptions:
    return EngineOptions(max_num_seqs=1, async_scheduling=False)


@pytest.mark.parametrize("num_gpus", [2, 4, 8])
def test_simulation_agrees_with_the_work_model(num_gpus: int) -> None:
    """Without pipelining the host's makespan is the structure's, up to rounding."""
    problem = five_models(num_gpus)
    plan, context = plan_with(problem)
    report = context.report
    assert report.objective_s is not None
    assert report.bound is not None
    (trace,) = context.simulate(plan)
    assert report.bound.value_s <= trace.makespan_s <= report.objective_s
    assert trace.makespan_s == pytest.approx(report.objective_s, rel=1e-3)
    for segment in trace.segments:  # nobody was moved from where the solver put it
        planned = {a.devices for s in plan.stages for a in s.assignments if a.node == segment.node}
        assert planned == {segment.devices}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_nodes=4, max_requests=6))
def test_random_problems(problem: Problem) -> None:
    plan, context = plan_with(problem, ticks=2000, deterministic_limit=2.0)
    report = context.report
    assert report.objective_s is not None
    assert report.bound is not None
    (trace,) = context.simulate(plan)
    least_s = float(np.mean(context.lower_bounds_s()))  # of plans of any structure
    assert least_s <= trace.makespan_s * (1 + 1e-9)
    assert min(least_s, report.objective_s) <= report.bound.value_s <= report.objective_s
    if not any(problem.app.upstreams):
        assert report.bound.value_s <= trace.makespan_s * (1 + 1e-9)
        assert trace.makespan_s <= report.objective_s * (1 + 1e-9)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_nodes=3, max_requests=6, max_scenarios=2))
def test_random_problems_in_segments(problem: Problem) -> None:
    """Segments of random problems make valid plans that finish, and never beat the host's bound."""
    plan, context = plan_with(problem, structure="segments", ticks=300, deterministic_limit=0.5)
    for scenario, trace in zip(problem.scenarios, context.simulate(plan), strict=True):
        assert lower_bound(problem, scenario).value_s <= trace.makespan_s * (1 + 1e-9)


def test_segments_resize_when_that_pays() -> None:
    """A model of one request leaves a GPU to the other; that one takes both once it has finished.

    Without switching: 228 s and 476 s after each other. With: both until 228 s, then what is left
    of the long one on two GPUs, 20 s to load and 352 s.
    """
    problem = make_problem(
        [
            TestNode("short", [4], [208], load_s=20.0, engine=one_by_one()),
            TestNode("long", [4] * 12, [76] * 12, load_s=20.0, engine=one_by_one()),
        ],
        2,
    )
    whole, fixed = plan_with(problem, ticks=1000)
    parts, resized = plan_with(problem, structure="segments", ticks=1000)
    assert fixed.report.status is PlanStatus.OPTIMAL
    assert resized.report.status is PlanStatus.FEASIBLE  # its bound holds in its work model only
    assert resized.report.objective_s is not None
    assert fixed.report.objective_s is not None
    assert fixed.report.objective_s == pytest.approx(704.0, rel=2e-3)
    assert resized.report.objective_s == pytest.approx(600.0, rel=5e-3)
    assert resized.mean_makespan_s(parts) < fixed.mean_makespan_s(whole)
    # Work in whole requests, and those in flight, are what the linear model leaves out.
    simulated = resized.mean_makespan_s(parts)
    assert simulated == pytest.approx(resized.report.objective_s, rel=0.08)
    sizes = {len(a.devices) for s in parts.stages for a in s.assignments if a.node == "long"}
    assert sizes == {1, 2}


def test_pipelined_consumer_overlaps_its_producer() -> None:
    nodes = [
        TestNode("writer", [5] * 40, list(range(10, 50)), load_s=5.0),
        TestNode("judge", [5] * 40, [10] * 40, [[(0, r)] for r in range(40)], load_s=5.0),
    ]
    problem = make_problem(nodes, 2)
    plan, context = plan_with(problem)
    (trace,) = context.simulate(plan)
    writer, judge = sorted(trace.segments, key=lambda s: s.node, reverse=True)
    assert judge.start_s < writer.end_s
    assert f"to {judge.end_s:.1f} s; it is the last" in context.report.explanation["judge"]
    assert trace.makespan_s == pytest.approx(context.report.objective_s, rel=0.02)


def test_coarse_ticks_stay_honest() -> None:
    """Whatever the ticks, bounds lie below every objective."""
    problem = five_models()
    found = [plan_with(problem, ticks=ticks)[1].report for ticks in (100, 1000, 20_000)]
    bounds = [r.bound.value_s for r in found if r.bound is not None]
    objectives = [r.objective_s for r in found if r.objective_s is not None]
    assert len(bounds) == len(objectives) == 3
    assert max(bounds) <= min(objectives)
    assert objectives[2] / bounds[2] - 1 < 1e-3


def test_bound_and_objective_are_told_apart_from_the_hosts_bound() -> None:
    problem = make_problem(
        [TestNode("a", [5] * 4, [[8] * 4, [30] * 4]), TestNode("b", [5] * 3, [9] * 3)],
        2,
        num_scenarios=2,
    )
    _, context = plan_with(problem)
    assert context.report.bound is not None
    assert "every model placed once" in context.report.bound.structure
    assert "mean of the bounds of 2 length scenarios" in context.report.bound.structure
    _, context = plan_with(problem, structure="segments", max_segments=3, ticks=100)
    assert context.report.bound is not None
    assert "at most 3 segments per model" in context.report.bound.structure
    assert "durations averaged over 2 length scenarios" in context.report.bound.structure


def test_progress_and_explanation() -> None:
    problem = five_models()
    seen: list[tuple[float | None, float | None]] = []
    context = SchedulingContext(
        PlanSimulator(problem),
        np.random.default_rng(0),
        progress=lambda b, i: seen.append((b, i)),
    )
    Exact(ExactOptions(workers=1)).schedule(problem, context)
    assert seen
    pairs = [(b, i) for b, i in seen if b is not None and i is not None and i < inf]
    assert all(b <= i * (1 + 1e-9) for b, i in pairs)
    assert context.report.objective_s == pytest.approx(min(i for _, i in pairs))
    assert set(context.report.explanation) == {n.name for n in problem.app.nodes}
    assert any("last to finish" in text for text in context.report.explanation.values())


def test_equal_seeds_give_equal_plans_with_several_workers() -> None:
    problem = five_models()
    assert plan_with(problem, workers=2)[0] == plan_with(problem, workers=2)[0]


def test_limit_of_time_still_gives_a_plan_and_a_bound() -> None:
    problem = five_models()
    plan, context = plan_with(problem, time_limit_s=0.001, branch_nodes=0)
    assert context.report.bound is not None
    assert context.report.objective_s is not None
    assert 0 < context.report.bound.value_s <= context.report.objective_s
    assert context.mean_makespan_s(plan) <= context.report.objective_s


def test_starts_from_another_schedulers_plan() -> None:
    problem = five_models(2)
    a, b = ParallelConfig(2), ParallelConfig(1)
    stages = [Stage((Assignment(f"n{i}", a, (0, 1)),)) for i in range(4)]
    given_plan = Plan((*stages, Stage((Assignment("n4", b, (0,)),))))
    asked: list[str] = []

    def schedule_with(name: str, /, *, options: object = None, budget_s: object = None) -> Plan:
        asked.append(name)
        return given_plan

    context = SchedulingContext(
        PlanSimulator(problem), np.random.default_rng(0), schedule_with=schedule_with
    )
    Exact(ExactOptions(workers=1, start_from="greedy")).schedule(problem, context)
    assert asked == ["greedy"]
    assert context.report.objective_s is not None
    assert context.report.objective_s <= context.mean_makespan_s(given_plan) * 1.001


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_nodes": 4}, ["5 nodes", "limited to 4", "scheduler auto", "max_nodes"]),
        ({"max_gpus": 2}, ["4 GPUs", "limited to 2", "scheduler auto", "max_gpus"]),
    ],
)
def test_too_large(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        plan_with(five_models(), **options)
    assert all(word in str(error.value) for word in words)


def test_too_large_by_default() -> None:
    nodes = [TestNode(f"n{i}", [5], [5]) for i in range(17)]
    with pytest.raises(InputError, match="17 nodes, and structure no-switching is limited to 16"):
        plan_with(make_problem(nodes, 2))
    with pytest.raises(InputError, match="6 nodes, and structure segments is limited to 5"):
        plan_with(make_problem(nodes[:6], 2), structure="segments")


def test_node_that_fits_nowhere_is_refused_before_planning() -> None:
    """Costs that were collected for another kind of GPU than the cluster has."""
    problem = make_problem([TestNode("a", [5], [5])], 2)
    with pytest.raises(InputError, match="model-a fits on no set of devices"):
        Problem(
            problem.app,
            Cluster.uniform(Gpu("other-gpu", 2**30), 2),
            problem.scenarios,
            ({ModeKey("test-gpu", 1): problem.costs[0][ModeKey("test-gpu", 1)]},),
        )


def test_two_kinds_of_gpu() -> None:
    """Each replica set lies on one kind, and the faster kind carries the longer model."""
    slow, fast = Gpu("slow", 2**36), Gpu("fast", 2**36)
    nodes = [TestNode("a", [5] * 8, [40] * 8), TestNode("b", [5] * 8, [10] * 8)]
    base = make_problem(nodes, 2)
    costs = []
    for node in nodes:
        (mode,) = node.costs().values()
        assert isinstance(mode.latency, StepLatency)
        quick = replace(mode, latency=mode.latency.scaled(0.5))
        costs.append({ModeKey("slow", 1): mode, ModeKey("fast", 1): quick})
    problem = Problem(base.app, Cluster((slow, slow, fast, fast)), base.scenarios, tuple(costs))
    plan, context = plan_with(problem)
    kinds = {
        a.node: {problem.cluster.gpus[d].name for d in a.devices}
        for s in plan.stages
        for a in s.assignments
    }
    assert kinds["a"] == {"fast"}
    assert all(len(k) == 1 for k in kinds.values())
    assert context.mean_makespan_s(plan) == pytest.approx(context.report.objective_s, rel=1e-3)


def test_plugin_imports_no_solver() -> None:
    code = (
        "import sys, samullm_cpsat.plugin;"
        "print([m for m in ('ortools', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ortools" not in done.stdout


def pipeline(kind: str, models: int, rng: np.random.Generator) -> Problem:
    """Return models that work on each other's outputs: in a row, or in a diamond."""
    nodes = []
    count = int(rng.integers(6, 30))
    for i in range(models):
        above = [i - 1] if i else []
        if kind == "diamond":
            above = [] if i == 0 else list(range(1, i)) if i == models - 1 else [0]
        nodes.append(
            TestNode(
                f"n{i}",
                rng.integers(4, 40, count).tolist(),
                rng.integers(2, 60, count).tolist(),
                [[(u, r) for u in above] for r in range(count)],
                step_s=float(rng.uniform(0.05, 0.4)),
                load_s=float(rng.uniform(0.5, 8.0)),
                sizes=(1, 2),
                engine=EngineOptions(max_num_seqs=int(rng.integers(2, 9)), async_scheduling=False),
            )
        )
    return make_problem(nodes, num_gpus=int(rng.integers(2, 5)))


@pytest.mark.parametrize("kind", ["row", "diamond"])
def test_no_plan_that_places_models_once_beats_the_bound(kind: str) -> None:
    """Chains of three to eight models, and diamonds: orders and sizes drawn, and simulated."""
    rng = np.random.default_rng(29 if kind == "row" else 31)
    worst = inf
    for models in range(3, 9):
        problem = pipeline(kind, models, rng)
        plan, context = plan_with(problem, time_limit_s=5.0, branch_nodes=200_000)
        report, simulator = context.report, context.simulator
        assert report.bound is not None
        own_s = simulator.simulate_scenario(plan, 0).makespan_s
        assert report.objective_s == pytest.approx(own_s)
        timings = measure(problem, simulator, 2000)
        full = timings.instance
        for _ in range(25):
            modes = [int(rng.integers(len(t.modes))) for t in full.tasks]
            if not all(full.placeable(t.modes[m]) for t, m in zip(full.tasks, modes, strict=True)):
                continue
            schedule = list_schedule(full, by_weight(full, rng.random(models).tolist()), modes)
            trial = plan_of(full, schedule, lambda placement: 1.0)
            makespan_s = simulator.simulate_scenario(trial, 0).makespan_s
            assert report.bound.value_s <= makespan_s * (1 + 1e-9)
            worst = min(worst, makespan_s / report.bound.value_s)
            if report.status is PlanStatus.OPTIMAL:
                assert own_s <= makespan_s * (1 + 1e-3)
    assert worst < 2.0  # the bound says something


def test_tiny_pipelines_are_optimal_among_all_orders_and_sizes() -> None:
    """By simulation of every schedule: what exact returns is close to the best of them."""
    rng = np.random.default_rng(5)
    for _ in range(4):
        problem = pipeline("row", 3, rng)
        plan, context = plan_with(problem, time_limit_s=5.0)
        simulator = context.simulator
        full = measure(problem, simulator, 2000).instance
        own_s = simulator.simulate_scenario(plan, 0).makespan_s
        best = inf
        for modes in product(*(range(len(t.modes)) for t in full.tasks)):
            if not all(full.placeable(t.modes[m]) for t, m in zip(full.tasks, modes, strict=True)):
                continue
            trial = plan_of(full, list_schedule(full, [0, 1, 2], modes), lambda placement: 1.0)
            best = min(best, simulator.simulate_scenario(trial, 0).makespan_s)
        assert own_s <= best * 1.01
