"""Plans carried out by hand-computed clocks."""

from __future__ import annotations

import numpy as np
import pytest

from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.rules.placement import place
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator, Rollout, with_idle_nodes
from samullm_plugin.testing.factories import TestNode, make_problem

SERIAL = EngineOptions(max_num_seqs=1, async_scheduling=False)
ONE, TWO = ParallelConfig(1), ParallelConfig(2)


def serial(name: str, outputs: list[int], **more: object) -> TestNode:
    """Requests one after the other, one second per output token, ten seconds to load."""
    return TestNode(name, [4] * len(outputs), outputs, engine=SERIAL, **more)  # type: ignore[arg-type]


def stage(*assignments: Assignment, end: StageEnd | None = None) -> Stage:
    return Stage(assignments, end or StageEnd())


def simulate(problem: Problem, *stages: Stage, scenario: int = 0) -> PlanTrace:
    plan = Plan(stages)
    assert verify(problem, plan) == ()
    return PlanSimulator(problem).simulate_scenario(plan, scenario)


def test_consumers_in_the_stage_take_outputs_as_they_come() -> None:
    up = serial("up", [5, 5, 5])
    down = serial("down", [2, 2, 2], inputs=[[(0, r)] for r in range(3)], load_s=1.0)
    problem = make_problem([up, down])
    trace = simulate(problem, stage(Assignment("up", ONE, (0,)), Assignment("down", ONE, (1,))))
    assert trace.finish_s[0] == pytest.approx([15, 20, 25])
    assert trace.finish_s[1] == pytest.approx([17, 22, 27])


def test_data_parallel_replicas_share_the_requests_in_turn() -> None:
    problem = make_problem([serial("a", [3, 5, 7, 9])])
    trace = simulate(problem, stage(Assignment("a", TWO, (0, 1))))
    assert trace.finish_s[0] == pytest.approx([13, 15, 20, 24])
    assert trace.idle_share == pytest.approx(1 - 24 / 48)


def test_what_goes_on_unchanged_costs_nothing() -> None:
    problem = make_problem([serial("a", [5]), serial("b", [20]), serial("c", [5])])
    a, b, c = (Assignment(n, ONE, (d,)) for n, d in (("a", 0), ("b", 1), ("c", 0)))
    trace = simulate(problem, stage(a, b), stage(b, c))
    assert trace.node_finish_s == pytest.approx([15, 30, 30])
    assert [s.node for s in trace.segments] == ["a", "b", "c"]
    assert trace.stage_start_s == pytest.approx((0, 15))


def test_a_moved_model_loads_and_prefills_again() -> None:
    problem = make_problem([serial("a", [5]), serial("b", [20])])
    first = stage(Assignment("a", ONE, (0,)), Assignment("b", ONE, (1,)))
    trace = simulate(problem, first, stage(Assignment("b", TWO, (0, 1))))
    # At 15 s b has 5 of its 20 tokens; a new start takes until 25 s, one more second per token.
    assert trace.node_finish_s == pytest.approx([15, 25 + 15])
    assert [(s.node, s.num_finished, s.finished) for s in trace.segments] == [
        ("a", 1, True),
        ("b", 0, False),
        ("b", 1, True),
    ]


def test_a_model_stopped_while_it_loads_has_done_nothing() -> None:
    problem = make_problem([serial("a", [5]), serial("b", [20], load_s=50.0)])
    first = stage(Assignment("a", ONE, (0,)), Assignment("b", ONE, (1,)))
    trace = simulate(problem, first, stage(Assignment("b", TWO, (0, 1))))
    assert trace.node_finish_s[1] == pytest.approx(15 + 50 + 20)
    assert trace.segments[1].busy_s == 0


def test_a_paused_model_resumes_with_its_tokens() -> None:
    problem = make_problem([serial("a", [5]), serial("b", [20]), serial("c", [30, 30])], 2)
    a, b = Assignment("a", ONE, (0,)), Assignment("b", ONE, (1,))
    both = Assignment("c", TWO, (0, 1))
    trace = simulate(problem, stage(a, b), stage(both), stage(b))
    # c waits for no device: b is stopped at 15 s, c runs until 55 s, b loads until 65 s.
    assert trace.node_finish_s == pytest.approx([15, 65 + 15, 55])


def test_a_stage_ends_when_a_node_has_done_a_share() -> None:
    problem = make_problem([serial("a", [5] * 10), serial("b", [5])], 2)
    half = StageEnd("node_progress", "a", 0.5)
    trace = simulate(
        problem,
        stage(Assignment("a", TWO, (0, 1)), end=half),
        stage(Assignment("a", ONE, (0,)), Assignment("b", ONE, (1,))),
    )
    # Five are done when the replicas have each finished their third: 25 s. One is left of six...
    assert trace.stage_start_s[1] == pytest.approx(25)
    assert int((trace.finish_s[0] <= 25).sum()) == 6
    assert trace.node_finish_s == pytest.approx([25 + 10 + 4 * 5, 25 + 10 + 5])


def test_untaken_requests_are_done_when_their_inputs_are() -> None:
    up = serial("up", [5, 5])
    down = serial("down", [3, 3], inputs=[[(0, 0)], [(0, 1)]], taken=[True, False], load_s=0.0)
    trace = simulate(
        make_problem([up, down]),
        stage(Assignment("up", ONE, (0,)), Assignment("down", ONE, (1,))),
    )
    assert trace.finish_s[1] == pytest.approx([18, 20])


def test_chains_wait_inside_their_node_and_stay_on_one_replica() -> None:
    chain = [[], [], [(0, 0)], [(0, 1)]]
    problem = make_problem([serial("a", [5, 7, 5, 7], inputs=chain)])
    trace = simulate(problem, stage(Assignment("a", TWO, (0, 1))))
    assert trace.finish_s[0] == pytest.approx([15, 17, 20, 24])


def test_a_consumer_before_its_paused_producer_makes_room_in_the_end() -> None:
    up = serial("up", [5, 5, 5])
    down = serial("down", [1] * 3, inputs=[[(0, r)] for r in range(3)])
    other = serial("other", [1])
    problem = make_problem([up, down, other], num_gpus=1, nvlink=1)
    here = {n: Assignment(n, ONE, (0,)) for n in ("up", "down", "other")}
    trace = simulate(
        problem,
        stage(here["up"], end=StageEnd("node_progress", "up", 0.3)),
        stage(here["down"]),
        stage(here["other"]),
    )
    assert np.isfinite(trace.makespan_s)


def test_other_scenarios_take_other_ways_through_the_same_plan() -> None:
    problem = make_problem(
        [
            TestNode("a", [4], [[5], [50]], engine=SERIAL),
            TestNode("b", [4], [[20], [20]], engine=SERIAL),
            serial("c", [5]),
        ],
        num_scenarios=2,
    )
    a1, b1, c1 = (Assignment(n, ONE, (d,)) for n, d in (("a", 0), ("b", 1), ("c", 0)))
    stages = (stage(a1, b1), stage(b1, c1))
    assert simulate(problem, *stages).node_finish_s == pytest.approx([15, 30, 30])
    # In the other scenario b is first, a holds the device that c was to have, and c takes b's.
    assert simulate(problem, *stages, scenario=1).node_finish_s == pytest.approx([60, 30, 45])


def test_rollouts_agree_with_the_simulation_of_their_plan() -> None:
    problem = make_problem([serial("a", [5, 5]), serial("b", [20, 3]), serial("c", [4])])
    simulator = PlanSimulator(problem)
    rollout = Rollout(simulator)
    stages = [{"a": ONE, "b": ONE}, {"b": ONE, "c": ONE}, {"c": TWO}]
    for wanted in stages:
        assignments = place(problem, wanted, rollout.held)
        assert assignments is not None
        rollout.run_stage(assignments)
    assert rollout.unfinished() == []
    trace = simulator.simulate_scenario(rollout.plan(), 0)
    assert trace.makespan_s == pytest.approx(rollout.states[0].clock_s)


def test_nodes_without_work_are_planned_for_nevertheless() -> None:
    up = serial("up", [5])
    idle = serial("idle", [5], inputs=[[(0, 0)]], taken=[False])
    down = serial("down", [5], inputs=[[(1, 0)]])
    problem = make_problem([up, idle, down])
    stages = [stage(Assignment("up", ONE, (0,))), stage(Assignment("down", ONE, (0,)))]
    plan = with_idle_nodes(problem, stages)
    assert verify(problem, plan) == ()
    assert PlanSimulator(problem).simulate(plan)[0].makespan_s == pytest.approx(30)
