"""Which engines sleep until they are needed again, and what that makes of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.host.interfaces.executor import EngineEvent, EngineSpec
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.preparing import wanted_ahead
from samullm_plugin.rules.sleeping import Asleep, sleeping
from samullm_plugin.rules.transition import Running, RunState, Transition
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem
from tests.run.worlds import run_with_truth

ONE = ParallelConfig()
ALL = StageEnd("all_finished")
NODES = ("write", "judge", "rewrite", "rate")


def turns(
    num_gpus: int = 1,
    *,
    sleep_s: float = 1.0,
    wake_s: float = 2.0,
    prepare_s: float = 0.0,
    host_memory_bytes: int | None = None,
) -> Problem:
    """Two models take turns: 20 iterations of a second each, engine starts of 10 s."""
    nodes = [
        TestNode(
            name,
            [4],
            [20],
            None if i == 0 else [[(i - 1, 0)]],
            load_s=10.0,
            prepare_s=prepare_s,
            sleep_s=sleep_s,
            wake_s=wake_s,
        )
        for i, name in enumerate(NODES)
    ]
    problem = make_problem(nodes, num_gpus, host_memory_bytes=host_memory_bytes)
    models = [problem.app.nodes[i % 2].model for i in range(4)]
    changed = [replace(n, model=m) for n, m in zip(problem.app.nodes, models, strict=True)]
    return replace(problem, app=replace(problem.app, nodes=tuple(changed)))


def on(node: str, *devices: int) -> Assignment:
    return Assignment(node, ParallelConfig(len(devices), 1, 1), devices)


IN_TURN = Plan(tuple(Stage((on(n, 0),), ALL) for n in NODES))


def begun(problem: Problem, plan: Plan, asleep: tuple[Asleep, ...] = ()) -> dict[str, Asleep]:
    """Return what falls asleep when the first node of a plan has finished."""
    first, second = (s.assignments[0] for s in plan.stages[:2])
    state = RunState(stage=0, finished={first.node})
    state.released = {first.node: Running(first, first.devices, 0)}
    move = Transition(1, (), (Running(second, second.devices, 1),))
    return dict(sleeping(problem, plan, state, move, asleep).begin)


def test_an_engine_wakes_for_the_next_node_of_its_model() -> None:
    """What follows it gets the devices when it sleeps; waking takes 2 s in place of 10."""
    problem = turns()
    trace = PlanSimulator(problem).simulate_scenario(IN_TURN, 0)
    assert [s.ready_s - s.start_s for s in trace.segments] == pytest.approx([10, 11, 3, 2])
    assert [s.woken for s in trace.segments] == [False, False, True, True]
    assert trace.makespan_s == pytest.approx(4 * 20 + 10 + 11 + 3 + 2)
    awake = problem.without_sleeping_engines()
    assert PlanSimulator(awake).simulate_scenario(IN_TURN, 0).makespan_s == pytest.approx(120)
    for one in (problem, awake):
        simulator = PlanSimulator(one)
        assert simulator.lower_bounds_s()[0] <= simulator.simulate_scenario(IN_TURN, 0).makespan_s


def test_only_what_comes_again_as_it_is_sleeps() -> None:
    """On the same devices in the same size, and if that takes less than starting it again."""
    assert list(begun(turns(), IN_TURN)) == ["write"]
    wide = Plan((*IN_TURN.stages[:2], Stage((on("rewrite", 0, 1),), ALL), IN_TURN.stages[3]))
    moved = Plan((*IN_TURN.stages[:2], Stage((on("rewrite", 1),), ALL), IN_TURN.stages[3]))
    never = Plan((*IN_TURN.stages[:2], IN_TURN.stages[3]))
    for plan in (wide, moved, never):
        assert begun(turns(2), plan) == {}
    assert begun(turns(sleep_s=5.0, wake_s=5.0), IN_TURN) == {}
    assert begun(turns(prepare_s=7.0), IN_TURN) == {}  # 3 s are left of a start
    assert begun(turns().without_shared_engines(), IN_TURN) == {}


def test_never_more_than_hosts_and_devices_have_room_for() -> None:
    other = Asleep(1, ONE, (1,))
    plan = Plan((*IN_TURN.stages, Stage((on("rate", 1),), ALL)))
    assert begun(turns(2, host_memory_bytes=2), plan, (other,)) != {}
    assert begun(turns(2, host_memory_bytes=1), plan, (other,)) == {}

    def keeping(share: float) -> Problem:
        problem = turns()
        kept = share * problem.cluster.gpus[0].memory_bytes
        costs = tuple(
            {k: replace(c, load=replace(c.load, asleep_device_bytes=kept)) for k, c in s.items()}
            for s in problem.costs
        )
        return replace(problem, costs=costs)

    assert begun(keeping(0.09), IN_TURN) != {}
    assert begun(keeping(0.11), IN_TURN) == {}  # an engine uses 0.9 of it


ELSEWHERE = Running(on("rewrite", 1), (0,), 1)
"""A node whose device is free later than another, on which it is planned in the end."""
THERE_AGAIN = Plan(
    (
        Stage((on("write", 0), on("judge", 1)), ALL),
        Stage((on("rewrite", 1),), ALL),
        Stage((on("rewrite", 0), on("rate", 1)), ALL),
    )
)


def test_what_is_taken_over_does_not_sleep() -> None:
    state = RunState(stage=0, finished={"write", "judge"})
    state.released = {"write": Running(on("write", 0), (0,), 0)}
    for takes_over, sleeps in ((None, ["write"]), ("write", [])):
        move = Transition(1, (), (replace(ELSEWHERE, takes_over=takes_over),))
        assert list(sleeping(turns(2), THERE_AGAIN, state, move, ()).begin) == sleeps


def test_what_wakes_leaves_its_memory_to_others() -> None:
    problem = turns(2, host_memory_bytes=1)
    state = RunState(stage=0, finished={"write", "judge"})
    state.released = {"judge": Running(on("judge", 1), (1,), 0)}
    change = sleeping(
        problem, THERE_AGAIN, state, Transition(1, (), (ELSEWHERE,)), [Asleep(0, ONE, (0,))]
    )
    assert list(change.wake) == ["rewrite"]
    assert list(change.begin) == ["judge"]


def test_what_sleeps_is_not_prepared_and_has_its_memory() -> None:
    problem = turns(prepare_s=6.0, host_memory_bytes=1)
    state = RunState(stage=1, finished={"write"})
    state.running = {"judge": Running(on("judge", 0), (0,), 1)}
    assert wanted_ahead(problem, IN_TURN, state) == (on("rewrite", 0),)
    assert wanted_ahead(problem, IN_TURN, state, [Asleep(0, ONE, (0,))]) == ()
    roomy = turns(prepare_s=6.0, host_memory_bytes=9)
    assert wanted_ahead(roomy, IN_TURN, state, [Asleep(0, ONE, (0,))]) == ()  # it wakes
    other = turns(prepare_s=6.0, host_memory_bytes=1).without_sleeping_engines()
    assert wanted_ahead(other, IN_TURN, state, [Asleep(1, ONE, (0,))]) == ()


def test_who_is_wanted_no_more_ends() -> None:
    """As does one whose devices are lost."""
    state = RunState(stage=2, finished={"write", "judge"})
    start = Transition(2, (), (Running(on("rewrite", 0), (0,), 2),))
    judge, lost = Asleep(1, ONE, (0,)), Asleep(1, ONE, (1,))
    plan = Plan((*IN_TURN.stages[:3], Stage((on("rate", 1),), ALL)))
    assert sleeping(turns(2), plan, state, start, [judge, lost]).end == (judge,)
    state.barred = {1}
    assert sleeping(turns(2), plan, state, start, [judge, lost]).end == (judge, lost)


class Dying(SimulatedExecutor):
    """One whose engines fail while they sleep, or refuse to."""

    refuse = False

    def sleep_engine(self, key: str) -> bool:
        if self.refuse:
            return False
        super().sleep_engine(key)
        self._late.append(EngineEvent(key, "failed", self.cluster.clock_s, reason="it died"))
        return True

    def wake_engine(self, key: str, spec: EngineSpec) -> None:
        raise AssertionError


@pytest.mark.parametrize("refuse", [False, True])
def test_engines_that_end_while_they_sleep_are_started(refuse: bool) -> None:
    executor, problem = Dying(), turns()
    executor.refuse = refuse
    run = run_with_truth(problem, IN_TURN, executor, problem)
    kinds = [r["kind"] for r in run.log.records]
    assert kinds.count("engine_asleep_failed") == (0 if refuse else 2)
    waited_s = 0.0 if refuse else 2 * 1.0  # what followed had been told to wait for them
    assert run.now_s() == pytest.approx(4 * 20 + 4 * 10 + waited_s)


def woken(run: Coordinator) -> list[str]:
    return [r["wakes"] for r in run.log.records if "wakes" in r]


def test_a_run_does_as_planned_and_tells() -> None:
    problem = turns()
    run = run_with_truth(problem, IN_TURN, SimulatedExecutor(), problem)
    assert run.now_s() == pytest.approx(106)
    assert woken(run) == ["write.0.0", "judge.0.0"]
    stopped = [r.get("asleep", False) for r in run.log.records if r["kind"] == "engine_stopped"]
    assert stopped == [True, True, False, False]
    awake = problem.without_sleeping_engines()
    assert woken(run_with_truth(awake, IN_TURN, SimulatedExecutor(), awake)) == []


def test_what_waking_took_is_not_kept_as_a_start() -> None:
    from samullm_plugin.run.calibrating import Calibrator

    class Kept(Calibrator):
        def __init__(self) -> None:
            self.starts: list[float] = []

        def add_steps(self, *given: object) -> None:
            pass

        def add_start(self, node: int, key: object, seconds: float) -> None:
            self.starts.append(seconds)

    problem, kept = turns(), Kept()
    run_with_truth(problem, IN_TURN, SimulatedExecutor(), problem, calibrator=kept)
    assert kept.starts == pytest.approx([10.0])


def test_a_plan_for_what_is_left_knows_what_sleeps() -> None:
    """The judge runs on, the writer sleeps and wakes; of starts nothing is left, nor in a bound."""
    problem = turns()
    rest = replace(problem, engine_of=problem.engine_numbers)
    running = {"write": (Running(on("write", 0), (0,), 0), 0.0)}
    simulator = PlanSimulator(rest, running=running, asleep=[Asleep(1, ONE, (0,))])
    trace = simulator.simulate_scenario(IN_TURN, 0)
    assert [s.ready_s - s.start_s for s in trace.segments] == pytest.approx([0, 3, 3, 2])
    assert simulator.lower_bounds_s()[0] <= trace.makespan_s
