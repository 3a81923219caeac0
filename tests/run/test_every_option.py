"""With every option of the plan space at once a run takes as long as planned, to 1e-9.

Pipeline stages, GPUs that engines share, prepared starts and sleeping engines within the host's
memory, engines shared or taken over, and the longest chains on a replica of their own; also where
other plans are adopted on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samullm_policies.plugin import IsolateLongest
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.model.costs import LoadTimes, ModeCosts
from samullm_plugin.model.plan import Assignment, EndKind, Plan, Stage, StageEnd
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.shared_gpus import Sharing, share_gpus
from samullm_plugin.model.types import Floats
from samullm_plugin.planning.policies import policy_call
from samullm_plugin.profiling.shared import beside_others
from samullm_plugin.rules.preparing import wanted_ahead
from samullm_plugin.rules.sharing import shared_problem, sharing_choices
from samullm_plugin.rules.sleeping import sleeping
from samullm_plugin.rules.transition import Running, RunState, next_transition
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.view import Replanning
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.simulator.runs import PolicyCall
from samullm_plugin.simulator.state import SimulationState
from samullm_plugin.testing.factories import GPU, TestNode, make_problem
from samullm_plugin.testing.strategies import plans, problems
from tests.run.test_coordinator_equals_simulator import consistent
from tests.run.test_shared_engines import judged
from tests.run.worlds import run_with_truth

PATIENT = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


ENDS: tuple[EndKind, ...] = ("all_finished", "first_finisher")


class Adopting(Replanning):
    """Adopts what is left of the run's own plan whenever a stage begins.

    Not where engines wait for devices or have got others than planned: a plan that is adopted names
    the devices that there are.
    """

    def __init__(self) -> None:
        self.adopted = 0

    def consider(self, run: Coordinator, *, stage_changed: bool) -> Plan | None:
        stage = run.plan.stages[run.rule.stage]
        planned = {a.node: a for a in stage.assignments if a.node not in run.rule.finished}
        running = run.rule.running.values()
        elsewhere = any(r.devices != r.planned.devices for r in running)
        there = {r.planned.node: r.planned for r in running}
        if not stage_changed or elsewhere or planned != there:
            return None
        self.adopted += 1
        return Plan(run.plan.stages[run.rule.stage :])


class AdoptingOthers(Replanning):
    """Adopts random plans for what is left when stages begin, wherever engines are by then.

    Attributes:
        adopted: those plans.
    """

    def __init__(self, data: st.DataObject, problem: Problem, count: int) -> None:
        self.adopted: list[Plan] = []
        self._data, self._problem, self._count = data, problem, count

    def consider(self, run: Coordinator, *, stage_changed: bool) -> Plan | None:
        if not stage_changed or len(self.adopted) == self._count:
            return None
        plan = left_of(self._data.draw(plans(self._problem)), run.rule.finished)
        self.adopted.append(plan)
        return plan


def left_of(plan: Plan, finished: set[str]) -> Plan:
    """Return a plan without the nodes that have finished."""
    stages = []
    for stage in plan.stages:
        assignments = tuple(a for a in stage.assignments if a.node not in finished)
        end = StageEnd("all_finished") if stage.end.node in finished else stage.end
        if assignments:
            stages.append(Stage(assignments, end))
    return Plan(tuple(stages))


def simulated(
    problem: Problem, plan: Plan, others: Sequence[Plan], policy: PolicyCall
) -> list[Floats]:
    """Return by node when requests finish if others are adopted when stages after the first begin.

    At the first chances there are, as :class:`AdoptingOthers` does.
    """
    simulator, left = PlanSimulator(problem, policy=policy), list(others)
    state, rule = simulator.initial_state(), RunState()
    while len(state.finished()) < len(problem.app.nodes):
        before = rule.stage
        next_s = enter(simulator, plan, state, rule)
        if left and before not in (-1, rule.stage):
            plan, rule = left.pop(0), RunState()
            for engine in state.active.values():
                held = engine.running.devices
                engine.running = Running(replace(engine.running.planned, devices=held), held, 0)
            next_s = enter(simulator, plan, state, rule)
        state.advance_to(next_s)
    assert not left
    return state.finish_s


def enter(simulator: PlanSimulator, plan: Plan, state: SimulationState, rule: RunState) -> float:
    """Apply the transition rule until something can go on; return when the next event happens."""
    app, stalled = simulator.problem.app, False
    upstreams = {
        n.name: [app.nodes[u].name for u in app.upstreams[i]] for i, n in enumerate(app.nodes)
    }
    while True:
        rule.finished = state.finished()
        rule.running = {n: a.running for n, a in state.active.items()}
        rule.released = dict(state.released)
        rule.done_fraction = {n.name: state.done_fraction(i) for i, n in enumerate(app.nodes)}
        stuck = stalled and rule.stage == len(plan.stages) - 1
        move = next_transition(
            plan,
            simulator.problem.cluster,
            upstreams,
            rule,
            stalled=stalled,
            same_engine=simulator.problem.same_engine,
        )
        change = sleeping(simulator.problem, plan, rule, move, state.asleep)
        for name in move.stop:
            state.stop(name)
        state.sleep(change)
        for running in move.start:
            state.start(running, change.wake.get(running.planned.node))
        state.released.clear()
        state.refresh()
        end = plan.stages[move.stage].end
        times = [t for i in range(len(app.nodes)) if (t := state.node_finish_s(i)) > state.clock_s]
        if end.kind == "node_progress" and end.node is not None:
            reached_s = state.time_of_fraction(app.index(end.node), end.fraction)
            times += [reached_s] if reached_s > state.clock_s else []
        if np.isfinite(min(times)):
            rule.running = {n: a.running for n, a in state.active.items()}
            state.prepare(wanted_ahead(simulator.problem, plan, rule, state.asleep))
            return min(times)
        assert not stuck
        stalled = True


def with_stages(problem: Problem, share: float) -> Problem:
    """Return the problem with two pipeline stages a replica as well, which start half as long."""

    def two(costs: ModeCosts) -> ModeCosts:
        load = replace(costs.load, warm_s=costs.load.warm_s / 2, prepare_s=costs.load.prepare_s / 2)
        return replace(costs, latency=costs.latency.scaled(share), load=load)

    sizes = tuple(
        {
            **c,
            **{
                ModeKey(GPU.name, 1, 2): two(one)
                for k, one in c.items()
                if k.tensor_parallel_size == 1
            },
        }
        for c in problem.costs
    )
    return replace(problem, costs=sizes)


def prepared(problem: Problem, share: float) -> Problem:
    """Return the problem with a part of each start that needs no device."""
    costs = tuple(
        {
            key: replace(
                c, load=replace(c.load, prepare_s=share * c.load.warm_s, prepared_bytes=1.0)
            )
            for key, c in sizes.items()
        }
        for sizes in problem.costs
    )
    return replace(problem, costs=costs)


def drowsy(problem: Problem, sleep: float, wake: float) -> Problem:
    """Return the problem with engines that sleep, in shares of their starts."""

    def load(one: LoadTimes) -> LoadTimes:
        taken = {"sleep_s": sleep * one.warm_s, "wake_s": wake * one.warm_s}
        return replace(one, **taken, asleep_bytes=1.0)

    costs = tuple({k: replace(c, load=load(c.load)) for k, c in s.items()} for s in problem.costs)
    return replace(problem, costs=costs)


def on_shared_gpus(problem: Problem, shared: int) -> Problem:
    """Return the problem on GPUs of which the first ones are shared by two engines."""
    whole = problem.cluster.num_gpus - shared
    sharing = [Sharing(2, 1.5)] * shared + [Sharing()] * whole
    cluster = share_gpus(problem.cluster, sharing)

    def sizes(costs: Mapping[ModeKey, ModeCosts]) -> dict[ModeKey, ModeCosts]:
        parts = {
            replace(k, gpu=cluster.kinds[0]): beside_others(c, cluster.gpus[0])
            for k, c in costs.items()
            if k.pipeline_parallel_size == 1
        }
        return {**costs, **parts}

    return replace(problem, cluster=cluster, costs=tuple(map(sizes, problem.costs)))


@st.composite
def worlds(draw: st.DrawFn) -> Problem:
    """Return problems of several models, and of several nodes of one model, shared or not."""
    kind = draw(st.sampled_from(["several", "taken over", "shared"]))
    if kind == "several":
        problem = consistent(draw(problems(engines=draw(st.sampled_from([None, 2])))))
    else:
        problem = prepared(judged(draw(st.sampled_from([2, 4]))), draw(st.sampled_from([0.0, 0.5])))
        if kind == "shared":
            problem = shared_problem(problem, sharing_choices(problem)[0])
    problem = with_stages(problem, draw(st.sampled_from([0.5, 0.8])))
    if draw(st.booleans()):
        problem = on_shared_gpus(problem, 2 * draw(st.integers(1, problem.cluster.num_gpus // 2)))
    times = draw(st.sampled_from([None, (0.0, 0.0), (0.1, 0.2), (0.3, 0.1)]))
    return problem if times is None else drowsy(problem, *times)


def assert_equal(problem: Problem, plan: Plan, replanner: Adopting | None) -> int:
    """Compare the simulation of a plan with a run; return how many engines woke."""
    call = policy_call(problem.app, IsolateLongest(), problem.scenarios)
    simulator = PlanSimulator(problem, policy=call)
    trace = simulator.simulate_scenario(plan, 0)
    assert simulator.lower_bounds_s()[0] <= trace.makespan_s * (1 + 1e-9)
    run = run_with_truth(
        problem, plan, SimulatedExecutor(), problem, policy=call, replanner=replanner
    )
    assert run.ledger.all_settled
    for i, finish_s in enumerate(trace.finish_s):
        np.testing.assert_allclose(run.ledger.finish_s[i], finish_s, rtol=1e-9, atol=1e-9)
    return sum(s.woken for s in trace.segments)


@PATIENT
@given(st.data())
def test_a_run_takes_as_long_as_planned(data: st.DataObject) -> None:
    problem = data.draw(worlds())
    assert_equal(problem, data.draw(plans(problem)), None)


@st.composite
def turns(draw: st.DrawFn) -> tuple[Problem, Plan]:
    """Return problems of two engines and plans in which they take turns, mostly on one place."""
    count, share = draw(st.integers(4, 7)), draw(st.sampled_from([0.0, 0.4]))
    nodes = []
    for i in range(count):
        n = draw(st.integers(1, 4))
        before = st.lists(st.integers(0, i - 1), max_size=2, unique=True) if i else st.just([])
        sources = draw(before)
        made = TestNode(
            f"n{i}",
            draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)),
            draw(st.lists(st.integers(1, 20), min_size=n, max_size=n)),
            [[(u, r % len(nodes[u].prompt_tokens)) for u in sources] for r in range(n)],
            load_s=3.0,
            prepare_s=3.0 * share,
            sizes=(1, 2),
        )
        nodes.append(made)
    host = draw(st.sampled_from([None, 1, 2]))
    problem = make_problem(nodes, draw(st.sampled_from([2, 4])), host_memory_bytes=host)
    costs = tuple(problem.costs[i % 2] for i in range(count))
    problem = replace(problem, costs=costs, engine_of=tuple(i % 2 for i in range(count)))
    problem = drowsy(problem, *draw(st.sampled_from([(0.0, 0.0), (0.1, 0.2), (0.3, 0.0)])))
    sizes = [draw(st.sampled_from(problem.parallel_configs(i)[:4])) for i in range(2)]
    stages: list[Stage] = []
    for i in problem.app.order:
        parallel, node = sizes[problem.engine_numbers[i]], problem.app.nodes[i].name
        held = {d for a in stages[-1].assignments for d in a.devices} if stages else set[int]()
        free = set(range(problem.cluster.num_gpus)) - held
        beside = problem.find_devices(i, parallel, free) if draw(st.integers(0, 3)) == 0 else None
        if beside is not None and stages:
            both = (*stages.pop().assignments, Assignment(node, parallel, beside))
            stages.append(Stage(both, StageEnd(draw(st.sampled_from(ENDS)))))
            continue
        devices = problem.idle_devices(i, parallel)
        assert devices is not None
        stages.append(Stage((Assignment(node, parallel, devices),), StageEnd("all_finished")))
    return problem, Plan(tuple(stages))


def test_engines_that_sleep_wake_as_planned() -> None:
    """Where two models take turns; also where what is left is adopted again and again."""
    woken, adopting = 0, Adopting()

    @settings(PATIENT, max_examples=150)
    @given(turns(), st.booleans())
    def check(made: tuple[Problem, Plan], adopts: bool) -> None:
        nonlocal woken
        woken += assert_equal(*made, adopting if adopts else None)

    check()
    assert woken > 40
    assert adopting.adopted > 20


def test_a_plan_that_is_adopted_changes_nothing_that_it_says_alike() -> None:
    """Neither engines nor the replicas of chains."""
    adopting = Adopting()

    @PATIENT
    @given(st.data())
    def check(data: st.DataObject) -> None:
        problem = data.draw(worlds())
        assert_equal(problem, data.draw(plans(problem)), adopting)

    check()
    assert adopting.adopted > 20


def test_other_plans_that_are_adopted_take_as_long_as_they_say() -> None:
    """Whatever ran, waited or was prepared by then."""
    adopted = [0, 0, 0]

    @settings(PATIENT, max_examples=75)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        problem = data.draw(worlds())
        plan = data.draw(plans(problem))
        call = policy_call(problem.app, IsolateLongest(), problem.scenarios)
        others = AdoptingOthers(data, problem, 2)
        run = run_with_truth(
            problem, plan, SimulatedExecutor(), problem, policy=call, replanner=others
        )
        adopted[len(others.adopted)] += 1
        assert run.ledger.all_settled
        finish_s = simulated(problem, plan, others.adopted, call)
        for i, lengths in enumerate(problem.scenarios[0].output_tokens):
            np.testing.assert_array_equal(run.ledger.generated[i], lengths)
            np.testing.assert_allclose(run.ledger.finish_s[i], finish_s[i], rtol=1e-9, atol=1e-9)

    check()
    assert adopted[2] > 30
