"""No plan beats the lower bound, whatever it mixes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.rules.bounds import _simulated, lower_bound
from samullm_plugin.rules.critical_path import Paths
from samullm_plugin.rules.iteration_prices import work_of
from samullm_plugin.rules.late_starts import Held, InSize, Simulated, done_s
from samullm_plugin.rules.transition import Running
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.strategies import plans, problems

ONE = ParallelConfig()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_plan_beats_the_bound(data: st.DataObject) -> None:
    problem = data.draw(problems())
    plan = data.draw(plans(problem))
    simulator = PlanSimulator(problem)
    makespan_s = simulator.simulate_scenario(plan, 0).makespan_s
    bound = lower_bound(problem, problem.scenarios[0])
    assert bound.value_s <= makespan_s * (1 + 1e-9) + 1e-9
    simulated_s = float(simulator.lower_bounds_s()[0])  # nodes in one go as they are simulated
    assert bound.value_s * (1 - 1e-5) <= simulated_s <= makespan_s * (1 + 1e-9) + 1e-9


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_plan_beats_the_bound_where_engines_are_taken_over(data: st.DataObject) -> None:
    problem = data.draw(problems(engines=2))
    simulator = PlanSimulator(problem)
    makespan_s = simulator.simulate_scenario(data.draw(plans(problem)), 0).makespan_s
    assert simulator.lower_bounds_s()[0] <= makespan_s * (1 + 1e-9) + 1e-9


def test_engines_that_several_nodes_use_are_started_once_per_device() -> None:
    """Four nodes of one model, 30 s of work each, are done on two devices at least."""
    serial = EngineOptions(max_num_seqs=1, async_scheduling=False)
    nodes = [TestNode(f"n{i}", [4], [30], load_s=40.0, engine=serial) for i in range(4)]
    problem = replace(make_problem(nodes, 4, nvlink=1), engine_of=(0,) * 4)
    bound = lower_bound(problem, problem.scenarios[0])
    # On one device 160 s, on two 100, on three 100, on four 70 (3 starts more).
    assert bound.value_s == pytest.approx(70.0, rel=1e-3)
    few = replace(make_problem(nodes, 2, nvlink=1), engine_of=(0,) * 4)
    assert lower_bound(few, few.scenarios[0]).value_s == pytest.approx(100.0, rel=1e-3)


def one_engine(node: TestNode) -> tuple[float, float]:
    problem = make_problem([node], 1, nvlink=1)
    plan = Plan((Stage((Assignment(node.name, ONE, (0,)),)),))
    bound = lower_bound(problem, problem.scenarios[0])
    return bound.value_s, PlanSimulator(problem).simulate_scenario(plan, 0).makespan_s


def test_a_chain_of_requests_is_its_critical_path() -> None:
    chain = TestNode("a", [10] * 3, [5, 6, 7], [[], [(0, 0)], [(0, 1)]], step_s=2.0, load_s=10.0)
    bound, makespan = one_engine(chain)
    assert makespan == pytest.approx(10 + 2 * (5 + 6 + 7))
    assert bound == pytest.approx(makespan)


def test_full_batches_are_their_device_seconds() -> None:
    engine = EngineOptions(max_num_seqs=4, async_scheduling=False)
    node = TestNode("a", [4] * 40, [50] * 40, step_s=1.0, load_s=0.0, engine=engine)
    bound, makespan = one_engine(node)
    assert bound >= 0.95 * makespan


def test_batches_are_no_larger_than_the_requests_there_are() -> None:
    """Beside a long request the device time of its iterations counts, whatever batches could be."""
    nodes = [TestNode(f"n{i}", [4] * 9, [2] * 8 + [400], step_s=1.0) for i in range(4)]
    problem = make_problem(nodes, 2, nvlink=1)
    bound = lower_bound(problem, problem.scenarios[0])
    assert bound.critical_path_s == pytest.approx(410.0 + 10.0)  # two have no device at 410
    assert bound.device_s == pytest.approx(2 * 410.0)


def test_engines_that_run_need_no_start() -> None:
    problem = make_problem([TestNode("a", [4] * 3, [30] * 3, load_s=50.0)], 1, nvlink=1)
    here = Assignment("a", ONE, (0,))
    plan, scenario = Plan((Stage((here,)),)), problem.scenarios[0]
    for ready_s in (0.0, -5.0, 20.0):
        running = {"a": (Running(here, (0,), 0), ready_s)}
        simulator = PlanSimulator(problem, running=running)
        makespan_s = simulator.simulate_scenario(plan, 0).makespan_s
        bound = lower_bound(problem, scenario, running).value_s
        assert 0.5 * (makespan_s - max(ready_s, 0.0)) <= bound <= makespan_s * (1 + 1e-9)
    assert lower_bound(problem, scenario).value_s > 70.0


def test_untaken_requests_cost_nothing() -> None:
    node = TestNode("a", [4, 4], [50, 5], taken=[False, True], load_s=1.0)
    problem = make_problem([node], 1, nvlink=1)
    bound = lower_bound(problem, problem.scenarios[0])
    assert bound.value_s == pytest.approx(6.0)
    assert np.isfinite(bound.device_s)


def test_preemption_may_save_reading_context() -> None:
    """Started anew at every second, a model whose context is dear never reads any."""
    dear = TestNode("dear", [50], [8], step_s=0.01, context_s=1.0, load_s=0.0)
    clock = TestNode(
        "clock",
        [1] * 10,
        [1] * 10,
        step_s=1.0,
        load_s=0.0,
        engine=EngineOptions(max_num_seqs=1, async_scheduling=False),
    )
    problem = make_problem([dear, clock], num_gpus=3, nvlink=1)
    ticks = Assignment("clock", ONE, (2,))
    ways = (Assignment("dear", ONE, (0,)), Assignment("dear", ONE, (1,)))
    stages = [
        Stage((ways[i % 2], ticks), StageEnd("node_progress", "clock", (i + 1) / 10))
        for i in range(8)
    ]
    makespan_s = PlanSimulator(problem).simulate_scenario(Plan(tuple(stages)), 0).makespan_s
    assert makespan_s < 20
    assert lower_bound(problem, problem.scenarios[0]).value_s <= makespan_s


def test_cached_blocks_count_for_several_sequences() -> None:
    """Eight sequences of 80 tokens run at once in a cache of 160, for they share 64."""
    engine = EngineOptions(max_num_seqs=8, enable_prefix_caching=True, async_scheduling=False)
    first = [[]] + [[(0, 0)]] * 8  # the first request fills the cache
    node = TestNode(
        "a",
        [66] * 9,
        [2] + [12] * 8,
        first,
        load_s=0.0,
        prefix_tokens=64,
        kv_cache_tokens=208,
        max_model_len=128,
        engine=engine,
        in_prompt=False,
    )
    bound, makespan = one_engine(node)
    assert makespan < 20
    assert bound <= makespan


@pytest.mark.parametrize(("caching", "fresh"), [(False, 33 + 40), (True, 1 + 8)])
def test_work_is_what_no_cache_and_no_first_token_saves(caching: bool, fresh: int) -> None:
    """A prompt's iteration gives the first token, reading nothing; full blocks may be cached."""
    engine = EngineOptions(enable_prefix_caching=caching, block_size=16)
    problem = make_problem([TestNode("a", [33, 40], [3, 1], engine=engine)], 1, nvlink=1)
    work = work_of(problem, problem.scenarios[0], 0)
    assert work.prefill == fresh - 2  # the last token of a prompt counts as one of output
    assert work.context == 2 * 33 + (1 + 2)
    assert work.chains[:3].tolist() == [3.0, 1.0, 0.0]


def alone_on(gpus: int, *nodes: TestNode) -> tuple[float, float]:
    """Return the bound with simulations of nodes alone, and the best of a few plans."""
    problem = make_problem(list(nodes), gpus, nvlink=1)
    simulator = PlanSimulator(problem)
    side_by_side = Plan((Stage(tuple(Assignment(n.name, ONE, (k,)) for k, n in enumerate(nodes))),))
    return (
        float(simulator.lower_bounds_s()[0]),
        simulator.simulate_scenario(side_by_side, 0).makespan_s,
    )


def test_what_is_done_in_one_go_takes_what_its_simulation_takes() -> None:
    """Iterations that first come, first served makes are counted up to the price of a start."""
    engine = EngineOptions(max_num_seqs=4, async_scheduling=False)
    lengths = [1, 2, 3, 4, 5, 6, 7, 40]  # the longest comes last
    node = TestNode("a", [4] * 8, lengths, step_s=1.0, load_s=20.0, engine=engine)
    problem = make_problem([node], 1, nvlink=1)
    by_prices_s = lower_bound(problem, problem.scenarios[0]).value_s
    bound_s, makespan_s = alone_on(1, node)
    assert by_prices_s < bound_s == pytest.approx(makespan_s, rel=1e-4)


def test_what_is_started_twice_costs_two_starts() -> None:
    """No plan in one go is as short as the bound if a second start would cost little."""
    engine = EngineOptions(max_num_seqs=4, async_scheduling=False)
    lengths = [1, 2, 3, 4, 5, 6, 7, 40]
    dear, cheap = (
        alone_on(1, TestNode("a", [4] * 8, lengths, step_s=1.0, load_s=load_s, engine=engine))
        for load_s in (20.0, 0.5)
    )
    assert dear[0] == pytest.approx(dear[1], rel=1e-4)
    assert cheap[0] <= 40.0 + 2 * 0.5 + 1e-3 < cheap[1]


def test_a_source_is_done_before_the_least_of_what_is_behind_it() -> None:
    first = TestNode("first", [4] * 2, [30, 30], load_s=10.0, step_s=1.0)
    second = TestNode("second", [4] * 2, [5, 9], [[(0, 0)], [(0, 1)]], load_s=10.0, step_s=1.0)
    problem = make_problem([first, second], 2, nvlink=1)
    paths = Paths(problem, problem.scenarios[0], {}, ())
    earliest = paths.earliest()
    found = [paths.window(earliest, i) for i in range(2)]
    assert earliest.end_s == pytest.approx(10 + 30 + 9)
    assert found[0].end_s == pytest.approx(40.0)
    assert found[0].tail_s == pytest.approx(5.0)
    assert (found[1].head_s, found[1].tail_s) == (pytest.approx(40.0), 0.0)


def in_a_row(count: int, gpus: int, **settings: float) -> tuple[float, float, float]:
    """Return critical path, bound, and the makespan of nodes that start one after another."""
    nodes = [
        TestNode(f"n{i}", [4], [2], [[(i - 1, 0)]] if i else None, step_s=1.0, **settings)
        for i in range(count)
    ]
    problem = make_problem(nodes, gpus, nvlink=1)
    simulator = PlanSimulator(problem)
    stages = [
        Stage(tuple(Assignment(f"n{k}", ONE, (k % gpus,)) for k in range(i, min(i + gpus, count))))
        for i in range(max(1, count - gpus + 1))
    ]
    found = simulator._lower_bound(0)
    makespan_s = simulator.simulate_scenario(Plan(tuple(stages)), 0).makespan_s
    return found.critical_path_s, found.value_s, makespan_s


def test_what_has_no_device_starts_after_the_first_end() -> None:
    """The first of three ends after 22 s; the third starts then, or another one does."""
    path_s, bound_s, makespan_s = in_a_row(3, 2, load_s=20.0)
    assert path_s == pytest.approx(22 + 20 + 2)
    assert bound_s == pytest.approx(makespan_s) == pytest.approx(44.0)
    assert in_a_row(3, 3, load_s=20.0)[0] == pytest.approx(20 + 3 * 2)


def test_every_choice_of_who_waits_is_followed() -> None:
    """Two GPUs are given up and taken twice, whoever waits first."""
    path_s, _, makespan_s = in_a_row(5, 2, load_s=20.0)
    assert 60.0 < path_s <= makespan_s == pytest.approx(66.0)


def test_who_waits_has_its_work_behind_that() -> None:
    """Of three one waits at 22 s: the last, which has one device until 44, as b has the other."""
    serial = EngineOptions(max_num_seqs=1, async_scheduling=False)
    nodes = [
        TestNode("a", [4], [2], load_s=20.0),
        TestNode("b", [4], [2], [[(0, 0)]], load_s=20.0),
        TestNode("c", [4] * 20, [2] * 20, [[(1, 0)]] * 20, load_s=20.0, engine=serial),
    ]
    problem = make_problem(nodes, 2, nvlink=1)
    found = lower_bound(problem, problem.scenarios[0])
    plan = Plan(
        (
            Stage((Assignment("a", ONE, (0,)), Assignment("b", ONE, (1,)))),
            Stage((Assignment("b", ONE, (1,)), Assignment("c", ONE, (0,)))),
        )
    )
    makespan_s = PlanSimulator(problem).simulate_scenario(plan, 0).makespan_s
    assert found.critical_path_s == pytest.approx(42.0 + 2.0 + 38.0 / 2)
    assert found.device_s < 60.0 < found.critical_path_s <= makespan_s == pytest.approx(82.0)


def test_devices_are_held_through_the_start_before_they_work() -> None:
    """One device at 1, none at 4, starts of 5 s: one works from 2 to 4, four do from 9 on."""
    held = Held(1, 5.0, 10.0)
    assert done_s(held, 2.0, ((1.0, 1), (4.0, 0)), 4) == pytest.approx(9.0 + (10.0 - 2.0) / 4)
    assert done_s(held, 2.0, (), 4) == pytest.approx(2.0 + 10.0 / 4)


def test_engines_on_more_devices_than_a_node_holds_have_stopped_or_start_later() -> None:
    """On two devices until 12 s at most, or from then on; on one; or started once more."""
    two = InSize(2, 5.0, 8.0, np.array([2.0, 4.0, 6.0, 0.0]))
    one = InSize(1, 5.0, 8.0, np.array([4.0, 8.0, 12.0, 0.0]))
    found = Simulated((two, one), np.array([30.0, 30.0, 18.5, 0.0]))
    assert found.later_s().tolist() == [10.0, 12.0, 14.0, 0.0]
    assert found.later_s([(11.0, 1), (12.0, 2)]).tolist() == [10.0, 16.0, 18.5, 0.0]
    assert found.later_s([(11.0, 0)]).tolist() == [10.0, 20.0, 18.5, 0.0]


def test_consumers_come_after_the_simulation_of_what_they_read() -> None:
    """One request after another: two replicas end sooner, and leave no device."""
    serial = EngineOptions(max_num_seqs=1, async_scheduling=False)
    nodes = [
        TestNode("a", [4] * 4, [10] * 4, step_s=1.0, load_s=100.0, engine=serial),
        TestNode("b", [4] * 4, [5] * 4, [[(0, r)] for r in range(4)], step_s=1.0, load_s=100.0),
    ]
    problem = make_problem(nodes, 2, nvlink=1)
    alone = lower_bound(problem, problem.scenarios[0])
    # At 110 s both hold a device: 20 s of work are done on two by then, 20 s are left on one.
    assert alone.critical_path_s == pytest.approx(110 + 20 + 5)
    simulator = PlanSimulator(problem)
    plan = Plan((Stage((Assignment("a", ONE, (0,)), Assignment("b", ONE, (1,)))),))
    found = simulator._lower_bound(0)  # on one device its requests end in turn
    assert found.critical_path_s == pytest.approx(100 + 4 * 10 + 5)
    assert found.value_s == pytest.approx(100 + 4 * 10 + 5, rel=1e-4)
    assert simulator.simulate_scenario(plan, 0).makespan_s == pytest.approx(145.0)


def test_a_second_start_may_be_sooner_than_the_simulation() -> None:
    serial = EngineOptions(max_num_seqs=1, async_scheduling=False)
    node = TestNode("a", [4] * 4, [10] * 4, step_s=1.0, load_s=8.0, engine=serial)
    problem = make_problem([node], 1, nvlink=1)
    paths = Paths(problem, problem.scenarios[0], {}, ())
    in_turn = np.array([10.0, 20.0, 30.0, 40.0])
    found = _simulated(problem, paths, paths.earliest(), (), lambda *_: in_turn)[0]
    assert found.later_s() == pytest.approx(8.0 + np.array([10.0, 18.0, 18.0, 18.0]))
    assert PlanSimulator(problem)._lower_bound(0).critical_path_s == pytest.approx(8 + 40)
