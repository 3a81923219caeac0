"""Which engines are prepared ahead, and what that makes of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.errors import InputError
from samullm_plugin.model.cluster import Network
from samullm_plugin.model.costs import LoadTimes
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.profiling.calibration import start_factor
from samullm_plugin.profiling.loading import ASSUMED
from samullm_plugin.rules.preparing import wanted_ahead
from samullm_plugin.rules.transition import Running, RunState
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import GPU, TestNode, make_problem

ONE = ParallelConfig(1, 1, 1)
ALL = StageEnd("all_finished")


def chain(
    host_memory_bytes: int | None = None, prepare_s: float = 8.0, num_gpus: int = 1
) -> Problem:
    """Three models one after another, each 50 iterations of a second, started in 10 s."""
    nodes = [
        TestNode(
            name,
            [4],
            [50],
            None if i == 0 else [[(i - 1, 0)]],
            load_s=10.0,
            prepare_s=prepare_s,
        )
        for i, name in enumerate("abc")
    ]
    return make_problem(nodes, num_gpus, host_memory_bytes=host_memory_bytes)


def on(node: str, *devices: int) -> Assignment:
    return Assignment(node, ParallelConfig(len(devices), 1, 1), devices)


IN_TURN = Plan(tuple(Stage((on(n, 0),), ALL) for n in "abc"))


def test_a_switch_takes_what_needs_a_device() -> None:
    """The first start takes 10 s, the later ones the 2 s that are left of them."""
    trace = PlanSimulator(chain()).simulate_scenario(IN_TURN, 0)
    assert trace.makespan_s == pytest.approx(10 + 50 + 2 + 50 + 2 + 50)
    assert [s.ready_s - s.start_s for s in trace.segments] == pytest.approx([10, 2, 2])
    whole = chain().without_prepared_starts()
    assert PlanSimulator(whole).simulate_scenario(IN_TURN, 0).makespan_s == pytest.approx(180)


def test_a_stage_shorter_than_the_preparing_waits_for_the_rest() -> None:
    """Of 80 s of preparing 50 s and 10 s of its own start lie before the switch."""
    nodes = [
        TestNode("a", [4], [50], load_s=10.0, prepare_s=8.0),
        TestNode("b", [4], [50], [[(0, 0)]], load_s=90.0, prepare_s=80.0),
    ]
    plan = Plan((Stage((on("a", 0),), ALL), Stage((on("b", 0),), ALL)))
    trace = PlanSimulator(make_problem(nodes, 1)).simulate_scenario(plan, 0)
    assert trace.makespan_s == pytest.approx(80 + 10 + 50)


def test_replicas_prepared_for_other_sizes_are_no_help() -> None:
    """A stage that is over as it begins is passed over, and its sizes were prepared for nothing."""
    from tests.run.worlds import run_with_truth

    nodes = [
        TestNode("a", [4], [50], load_s=10.0, prepare_s=8.0),
        TestNode("c", [4], [50], load_s=10.0, prepare_s=8.0),
        TestNode("b", [4], [50], [[(0, 0)]], load_s=10.0, prepare_s=8.0),
    ]
    problem = make_problem(nodes, 2)
    plan = Plan(
        (
            Stage((on("a", 0), on("c", 1)), StageEnd("node_finished", "a")),
            Stage((on("b", 0), on("c", 1)), StageEnd("node_finished", "c")),
            Stage((on("b", 0, 1),)),
        )
    )
    trace = PlanSimulator(problem).simulate_scenario(plan, 0)
    assert trace.segments[-1].devices == (0, 1)
    assert trace.makespan_s == pytest.approx(10 + 50 + 10 + 50)
    assert run_with_truth(problem, plan, SimulatedExecutor(), problem).now_s() == trace.makespan_s


def test_the_next_stage_that_starts_something_is_prepared() -> None:
    """What runs on as it is needs no start; what is resized does."""
    problem = chain(num_gpus=2)
    stages = (
        Stage((on("a", 0), on("b", 1))),
        Stage((on("a", 0), on("b", 1)), StageEnd("node_progress", "a", 0.5)),
        Stage((on("b", 0, 1),)),
        Stage((on("c", 0),)),
    )
    state = RunState(stage=0)
    state.running = {a.node: Running(a, a.devices, 0) for a in stages[0].assignments}
    assert wanted_ahead(problem, Plan(stages), state) == (on("b", 0, 1),)
    state.finished = {"b"}
    assert wanted_ahead(problem, Plan(stages), state) == (on("c", 0),)


def test_what_waits_for_devices_is_prepared() -> None:
    state = RunState(stage=0)
    state.running = {"a": Running(on("a", 0), (0,), 0)}
    plan = Plan((Stage((on("a", 0), on("b", 1))), Stage((on("c", 0),))))
    assert wanted_ahead(chain(num_gpus=2), plan, state) == (on("b", 1), on("c", 0))


def test_never_more_than_the_hosts_memory_holds() -> None:
    """A prepared replica takes a byte here; two fit into two, the third does not."""
    plan = Plan((Stage((on("a", 0),)), Stage((on("b", 0, 1), on("c", 0)))))
    state = RunState(stage=0)
    state.running = {"a": Running(on("a", 0), (0,), 0)}
    assert wanted_ahead(chain(2, num_gpus=2), plan, state) == (on("b", 0, 1),)
    assert wanted_ahead(chain(1, num_gpus=2), plan, state) == (on("c", 0),)
    assert wanted_ahead(chain(3, num_gpus=2), plan, state) == (on("b", 0, 1), on("c", 0))
    assert wanted_ahead(chain(prepare_s=0.0, num_gpus=2), plan, state) == ()


def test_each_machine_holds_its_share_of_a_replica_that_lies_on_two() -> None:
    """Half of a replica's memory, on machines that hold half a replica each."""
    for host, prepared in ((0.5, ["b"]), (0.4, [])):
        problem = chain(num_gpus=3)
        wide = {replace(k, pipeline_parallel_size=2): c for k, c in problem.costs[1].items()}
        cluster = replace(
            problem.cluster,
            nvlink_groups=((0,), (1,), (2,)),
            machines=((0,), (1,), (2,)),
            network=Network(1e9, 1e-4),
        )
        object.__setattr__(cluster, "host_memory_bytes", host)  # of bytes that are one in all
        problem = replace(
            problem, cluster=cluster, costs=(problem.costs[0], wide, problem.costs[2])
        )
        b = Assignment("b", ParallelConfig(1, 1, 2), (1, 2))
        plan = Plan((Stage((on("a", 0),), ALL), Stage((b,), ALL), Stage((on("c", 0),), ALL)))
        state = RunState(stage=0)
        state.running = {"a": Running(on("a", 0), (0,), 0)}
        assert [a.node for a in wanted_ahead(problem, plan, state)] == prepared


def test_an_executor_that_cannot_is_not_asked() -> None:
    from tests.run.worlds import run_with_truth

    class Plain(SimulatedExecutor):
        can_prepare = False  # type: ignore[assignment]  # as third parties' executors have it

        def prepare_engine(self, spec: object) -> bool:
            raise AssertionError

    coordinator = run_with_truth(chain(), IN_TURN, Plain(), chain())
    assert coordinator.now_s() == pytest.approx(180)


def test_what_was_left_of_a_prepared_start_is_not_kept_as_a_start() -> None:
    """Else the next plan without preparing would take starts to be as short."""
    from samullm_plugin.run.calibrating import Calibrator
    from tests.run.worlds import run_with_truth

    problem = chain()
    costs = tuple(
        {k: replace(c, load=replace(c.load, source=ASSUMED)) for k, c in sizes.items()}
        for sizes in problem.costs
    )
    problem = replace(problem, costs=costs)
    calibrator = Calibrator(problem)
    run = run_with_truth(problem, IN_TURN, SimulatedExecutor(), problem, calibrator=calibrator)
    calibrator.keep(run.ledger)
    assert start_factor(GPU.name) == pytest.approx(1.0)  # of 10 s, not of the 2 s left of the rest


def test_a_part_is_no_longer_than_the_whole() -> None:
    with pytest.raises(InputError, match=r"prepare_s is 3\.0 s, a part of warm_s 2\.0 s"):
        LoadTimes(2.0, 2.0, prepare_s=3.0)
