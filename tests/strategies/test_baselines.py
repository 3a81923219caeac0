"""The paper's two heuristics, by hand and on random problems."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from samullm_baselines.plugin import MaxHeuristic, MinHeuristic

from samullm_plugin.host.interfaces.scheduler import SchedulingContext, StageScheduler
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.strategies import problems

SERIAL = EngineOptions(max_num_seqs=1, async_scheduling=False)
ONE, TWO, PAIR = ParallelConfig(1), ParallelConfig(2), ParallelConfig(1, 2)


def plan_with(scheduler: StageScheduler, problem: Problem) -> tuple[Plan, float]:
    context = SchedulingContext(PlanSimulator(problem), np.random.default_rng(0))
    plan = scheduler.schedule(problem, context)
    assert verify(problem, plan) == ()
    return plan, context.mean_makespan_s(plan)


def serial(name: str, requests: int, output: int, **more: object) -> TestNode:
    outputs = [output] * requests
    return TestNode(name, [4] * requests, outputs, engine=SERIAL, **more)  # type: ignore[arg-type]


def test_max_runs_one_model_at_a_time_on_the_fastest_full_configuration() -> None:
    many = serial("many", 4, 10, sizes=(1, 2))  # two replicas: 20 s; one of two GPUs: 4 x 5 s
    few = serial("few", 1, 10, sizes=(1, 2))  # one replica of two GPUs: 5 s
    odd = serial("odd", 3, 10)
    problem = make_problem([many, few, odd], num_gpus=3)
    plan, makespan = plan_with(MaxHeuristic(), problem)
    chosen = [s.assignments[0].parallel for s in plan.stages]
    # Three GPUs are one pair and one more, so a pair leaves no room for another pair.
    assert chosen == [PAIR, PAIR, ParallelConfig(3)] or chosen[1:] == [PAIR, ParallelConfig(3)]
    assert makespan == pytest.approx(30 + 20 + 5 + 10, abs=5)


def test_max_waits_for_upstreams() -> None:
    down = serial("down", 1, 5, inputs=[[(1, 0)]])
    up = serial("up", 1, 5)
    plan, _ = plan_with(MaxHeuristic(), make_problem([down, up]))
    assert [s.assignments[0].node for s in plan.stages] == ["up", "down"]


def test_min_holds_where_another_model_is_first() -> None:
    """Two models of nearly equal length, and one that reads both and then gets all GPUs."""

    def world(a: int, b: int) -> Problem:
        reads = [[(0, 0), (1, 0)]] * 60
        nodes = [serial("a", 4, a), serial("b", 4, b), serial("c", 60, 10, inputs=reads, load_s=1)]
        return make_problem(nodes, num_gpus=2, nvlink=1)

    plan, makespan = plan_with(MinHeuristic(), world(30, 33))
    other = PlanSimulator(world(33, 30)).simulate_scenario(plan, 0).makespan_s
    assert other < 1.1 * makespan


def test_min_splits_evenly_and_gives_the_rest_to_the_longest() -> None:
    short, long = serial("short", 4, 5), serial("long", 4, 20)
    problem = make_problem([short, long], num_gpus=3, nvlink=1)
    plan, _ = plan_with(MinHeuristic(), problem)
    sizes = {a.node: a.parallel for a in plan.stages[0].assignments}
    assert sizes == {"short": ONE, "long": TWO}


def test_min_gives_a_large_model_its_least() -> None:
    large = serial("large", 2, 30, sizes=(2,))
    small = [serial(n, 2, 30) for n in "abc"]
    problem = make_problem([large, *small], num_gpus=4)
    plan, _ = plan_with(MinHeuristic(), problem)
    sizes = {a.node: a.parallel for a in plan.stages[0].assignments}
    assert len(sizes) == 3  # one small model has to wait
    assert sizes.get("large") == PAIR


def test_min_resizes_what_runs_only_if_it_pays() -> None:
    worth = make_problem([serial("a", 2, 10), serial("b", 4, 100)], num_gpus=2)
    plan, makespan = plan_with(MinHeuristic(), worth)
    assert plan.stages[1].assignments[0].parallel == TWO
    assert makespan < 10 + 400
    not_worth = make_problem([serial("a", 2, 10), serial("b", 4, 12, load_s=50.0)], num_gpus=2)
    plan, makespan = plan_with(MinHeuristic(), not_worth)
    assert makespan == pytest.approx(50 + 48)


def test_min_simulates_no_size_that_all_models_pass_on_the_way() -> None:
    problem = make_problem([serial(n, 12, 5 + k) for k, n in enumerate("abc")], num_gpus=12)
    simulator = PlanSimulator(problem)
    plan = MinHeuristic().schedule(problem, SchedulingContext(simulator, np.random.default_rng(0)))
    assert [a.parallel.num_devices for a in plan.stages[0].assignments] == [4, 4, 4]
    asked = {parallel.num_devices for _, _, parallel, *_ in simulator.runs.alone_s}
    assert asked <= {1, 4, 6, 12}  # to be put in order, and the shares of three, two and one


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_scenarios=2))
def test_plans_are_valid_and_finish(problem: Problem) -> None:
    for scheduler in (MaxHeuristic(), MinHeuristic()):
        _, makespan = plan_with(scheduler, problem)
        assert np.isfinite(makespan)
