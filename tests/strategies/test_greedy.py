"""The greedy followed by hand, and what its options change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from samullm_greedy.plugin import GreedyOptions, GreedyScheduler
from samullm_greedy.throughput import (
    StageView,
    WorkMeter,
    mean_throughput,
    mean_throughputs,
)

import samullm_plugin as sl
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.placement import place
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TINY_ARCHITECTURE, TestNode, make_problem
from samullm_plugin.testing.strategies import problems

ONE_BY_ONE = EngineOptions(max_num_seqs=1, async_scheduling=False)
A1, A2 = Assignment("a", ParallelConfig(1), (0,)), Assignment("a", ParallelConfig(2), (0, 1))
B1, B2 = Assignment("b", ParallelConfig(1), (1,)), Assignment("b", ParallelConfig(2), (0, 1))


def two_models() -> Problem:
    """Requests one after the other, one second per iteration, the first iteration the prompt's.

    a: 4 requests of 4 s and 7 + 3 = 10 tokens each (the last output token is never computed),
       load 4 s: 20 s on one GPU, 12 s on two.
    b: 2 requests of 7 s and 14 + 6 = 20 tokens each, load 8 s: 22 s on one GPU, 15 s on two.
    """
    a = TestNode("a", [7] * 4, [4] * 4, load_s=4.0, engine=ONE_BY_ONE)
    b = TestNode("b", [14] * 2, [7] * 2, load_s=8.0, engine=ONE_BY_ONE)
    return make_problem([a, b], num_gpus=2)


def schedule(problem: Problem, **options: object) -> Plan:
    scheduler = GreedyScheduler(GreedyOptions.model_validate(options))
    context = SchedulingContext(PlanSimulator(problem), np.random.default_rng(0))
    plan = scheduler.schedule(problem, context)
    assert verify(problem, plan) == ()
    return plan


def test_by_hand_step_by_step() -> None:
    problem = two_models()
    simulator = PlanSimulator(problem)
    meter = WorkMeter(problem, "tokens", [1.0] * len(problem.app.nodes))
    state = simulator.initial_state()

    def throughput(*stage: Assignment) -> float:
        return mean_throughput([StageView(simulator, state, meter)], stage)

    # From nothing: 40 tokens of either model, over the time of a stage of that model alone.
    assert throughput(A1) == pytest.approx(40 / 20)  # gain per GPU 2.00: the largest
    assert throughput(A2) == pytest.approx(40 / 12)  # 1.67
    assert throughput(B1) == pytest.approx(40 / 22)  # 1.82
    assert throughput(B2) == pytest.approx(40 / 15)  # 1.33
    # With a on one GPU: more of a gains 40/12 - 2 = 1.33; with b beside it, a finishes first, at
    # 20 s; b has then served for 12 s: a whole request, and 14 + 4 tokens of the other.
    assert throughput(A1, B1) == pytest.approx((40 + 38) / 20)  # gain 1.90: the larger
    # No GPU is left: the stage is {a, b}, and it ends at 20 s.
    state.keep_only([A1, B1])
    state.advance_to(20.0)
    assert state.finished() == {"a"}
    # b has generated 5 of its second request's 7 tokens: 2 s are left if it goes on. On two GPUs
    # it would load for 8 s, prefill 14 + 5 tokens, of which only the last is new, and decode one.
    assert throughput(B1) == pytest.approx(2 / 2)  # gain 1.0: the larger
    assert throughput(B2) == pytest.approx(2 / 10)  # gain 0.1
    plan = schedule(problem, objective="tokens")
    assert [s.assignments for s in plan.stages] == [(A1, B1), (B1,)]
    assert simulator.simulate(plan)[0].makespan_s == pytest.approx(22)


def test_the_papers_objective_counts_recomputed_tokens() -> None:
    """It resizes b for the work of prefilling again what it had, and loses 8 s by it."""
    problem = two_models()
    plan = schedule(problem, objective="paper")
    assert plan.stages[1].assignments[0].parallel == ParallelConfig(2)
    assert PlanSimulator(problem).simulate(plan)[0].makespan_s == pytest.approx(20 + 8 + 2)
    corrected = schedule(problem, objective="corrected")
    assert PlanSimulator(problem).simulate(corrected)[0].makespan_s == pytest.approx(22)


def test_without_preemption_a_started_model_keeps_its_configuration() -> None:
    problem = two_models()
    plan = schedule(problem, objective="paper", preemption=False)
    configs = {a.node: set() for s in plan.stages for a in s.assignments}  # type: ignore[var-annotated]
    for stage in plan.stages:
        for a in stage.assignments:
            configs[a.node].add((a.parallel, a.devices))
    assert all(len(c) == 1 for c in configs.values())


def test_the_papers_objective_counts_all_experts() -> None:
    mixture = replace(TINY_ARCHITECTURE, num_experts=8, num_active_experts=2)
    problem = make_problem([TestNode("m", [4], [4], architecture=mixture)])
    one = np.ones(1)
    paper, corrected = (
        WorkMeter(problem, o, [1.0]).work(0, one, 0 * one)[0] for o in ("paper", "corrected")
    )  # type: ignore[arg-type]
    expert = 2 * 2 * mixture.expert_params  # two FLOPs per parameter, two layers
    assert paper - corrected == pytest.approx(6 * expert)


def test_a_model_is_ready_when_its_upstreams_are_in_the_stage() -> None:
    up = TestNode("up", [4] * 8, [20] * 8, load_s=1.0, engine=ONE_BY_ONE)
    inputs = [[(0, r)] for r in range(8)]
    down = TestNode("down", [4] * 8, [20] * 8, inputs, load_s=1.0, engine=ONE_BY_ONE)
    plan = schedule(make_problem([up, down], num_gpus=2))
    first = [a.node for a in plan.stages[0].assignments]
    assert first[0] == "up"  # alone it is not ready
    assert set(first) == {"up", "down"}


def test_a_model_of_unknown_architecture_is_named() -> None:
    problem = make_problem([TestNode("m", [4], [4], architecture=None)])
    with pytest.raises(InputError, match=r"model-m.*architecture.*objective=tokens"):
        schedule(problem)
    assert schedule(problem, objective="tokens").stages


def test_models_that_go_on_are_moved_only_where_groups_are_torn() -> None:
    small = [TestNode(n, [4], [4]) for n in "ab"]
    big = TestNode("c", [4], [4], sizes=(2,))
    problem = make_problem([*small, big], num_gpus=4)
    one, pair = ParallelConfig(1), ParallelConfig(1, 2)
    held = {"a": Assignment("a", one, (0,)), "b": Assignment("b", one, (3,))}
    stay = place(problem, {"a": one, "b": one}, held)
    assert stay == (held["a"], held["b"])
    moved = place(problem, {"a": one, "b": one, "c": pair}, held)
    assert moved is not None
    assert moved[0] == held["a"]
    assert moved[1].devices == (1,)
    assert set(moved[2].devices) == {2, 3}
    assert place(problem, {"a": one, "b": ParallelConfig(2), "c": pair}, held) is None


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_scenarios=2))
def test_plans_are_valid_and_finish(problem: Problem) -> None:
    for options in ({}, {"preemption": False}, {"objective": "corrected"}):
        plan = schedule(problem, **options)
        for trace in PlanSimulator(problem).simulate(plan):
            assert np.isfinite(trace.makespan_s)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_scenarios=2))
def test_a_stage_that_grows_is_judged_as_if_looked_at_anew(problem: Problem) -> None:
    """Exactly, with consumers behind what was added or changed, and others that run on."""
    simulator = PlanSimulator(problem)
    states = [simulator.initial_state(s) for s in range(len(problem.scenarios))]
    for stage in schedule(problem).stages:
        meter = WorkMeter(problem, "corrected", [1.0] * len(problem.app.nodes))
        views = [StageView(simulator, state, meter) for state in states]
        for k, last in enumerate(stage.assignments):
            others = [a for a in stage.assignments if a is not last]
            new = [last, *stage.assignments[:k]]
            anew = [
                mean_throughput(
                    [StageView(simulator, state, meter) for state in states],
                    tuple({**{a.node: a for a in others}, n.node: n}.values()),
                )
                for n in new
            ]
            assert mean_throughputs(views, others, new) == anew
        for state in states:
            left = [a for a in stage.assignments if a.node not in state.finished()]
            if left:
                state.keep_only(left)
                index = problem.app.index
                state.advance_to(min(state.node_finish_s(index(a.node)) for a in left))


def test_functions_between_models_are_none_of_its_nodes() -> None:
    examples = Path(__file__).parents[2] / "examples" / "applications"
    app = sl.App.from_yaml(examples / "preference-data" / "app.yaml")
    plan = app.plan(scheduler="greedy", scenarios=1)
    planned = {a.node for stage in plan.stages for a in stage.assignments}
    assert planned == {"generate.mistral", "generate.vicuna", "rate"}
