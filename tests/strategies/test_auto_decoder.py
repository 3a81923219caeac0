"""Decoded makespans agree with those of the plans built from the same solutions."""

from __future__ import annotations

import os
from dataclasses import replace
from time import monotonic

import numpy as np
import pytest
from samullm_auto.builder import Builder
from samullm_auto.decoder import NEVER, decode, value_s
from samullm_auto.neighbourhood import HEATS, Chain, anneal, annealing_chains, compile_ahead, move
from samullm_auto.search import offered
from samullm_auto.solution import Solution, solutions_of
from samullm_auto.surrogate import MOMENTS, Surrogate, list_solutions
from samullm_tasks.timing import TimedMode

from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem

NO_FUSE = float("inf")


def serial(name: str, requests: int, output: int, **more: object) -> TestNode:
    """Return a node whose replicas answer one request at a time."""
    engine = EngineOptions(max_num_seqs=1, async_scheduling=False)
    return TestNode(name, [4] * requests, [output] * requests, engine=engine, **more)  # type: ignore[arg-type]


def behind(name: str, producer: int, requests: int, output: int) -> TestNode:
    """Return a node whose every request waits for the same one of its producer."""
    return serial(name, requests, output, inputs=[[(producer, k)] for k in range(requests)])


def independent() -> Problem:
    work = ((8, 30), (6, 25), (9, 20), (4, 33), (5, 14), (12, 9))
    return make_problem([serial(f"m{i}", *w, sizes=(1, 2)) for i, w in enumerate(work)], num_gpus=6)


def dependent() -> Problem:
    nodes = [
        serial("a", 16, 20),
        serial("b", 12, 30),
        behind("c", 0, 16, 12),
        behind("d", 1, 12, 9),
    ]
    return make_problem(nodes, num_gpus=4)


def timed(problem: Problem) -> list[list[TimedMode]]:
    """Return all modes that are offered, by node."""
    nodes = range(len(problem.app.nodes))
    return [[TimedMode.idle(problem, i, p) for p in offered(problem, i)] for i in nodes]


class Workshop:
    """All that turns a problem's solutions into figures."""

    def __init__(self, problem: Problem, scenarios: int = 1) -> None:
        problem = problem.with_scenarios(problem.scenarios[:1] * scenarios)
        self.problem, self.simulator = problem, PlanSimulator(problem)
        self.modes = [offered(problem, i) for i in range(len(problem.app.nodes))]
        self.surrogate = Surrogate(
            problem, self.simulator, range(scenarios), timed(problem), pairs=True
        )
        self.builder = Builder(problem, self.simulator, 0, self.modes)

    def decoded_s(self, solution: Solution) -> float:
        return float(decode(self.surrogate.tables, self.surrogate.encode(solution), 0, NEVER)[0])

    def simulated_s(self, solution: Solution) -> float:
        plan = self.builder.build(solution)
        assert verify(self.problem, plan) == ()
        return self.simulator.simulate_scenario(plan, 0).makespan_s

    def solutions(self, count: int) -> list[Solution]:
        """Return solutions of a random walk."""
        rng, count_of = np.random.default_rng(7), len(self.modes)
        first = list_solutions(self.problem.app, self.modes, self.surrogate)[0]
        walker = self.surrogate.encode(first)
        weights = np.arange(1, count_of + 1) / count_of
        found = [first]
        while len(found) < count:
            move(self.surrogate.tables, walker, weights, np.array(MOMENTS), rng)
            found.append(self.surrogate.solution(walker))
        return found


def test_without_resizing_decoding_is_the_simulation() -> None:
    shop = Workshop(independent())
    for solution in shop.solutions(60):
        fixed = replace(solution, splits=(), strict=False, grow=False)
        assert shop.decoded_s(fixed) == pytest.approx(shop.simulated_s(fixed), rel=1e-6), fixed


def test_dependent_models_run_no_later_than_decoded() -> None:
    """The run may start models earlier: it gives idle devices to those of later stages."""
    shop = Workshop(dependent())
    solutions = [replace(r, splits=(), strict=False, grow=False) for r in shop.solutions(80)]
    decoded, simulated = np.array([(shop.decoded_s(r), shop.simulated_s(r)) for r in solutions]).T
    assert (simulated <= decoded * (1 + 1e-6)).all()
    assert np.mean(np.abs(simulated - decoded) < 1e-6 * decoded) > 0.5


def test_resized_models_are_decoded_closely() -> None:
    shop = Workshop(independent())
    solutions = [replace(r, strict=False) for r in shop.solutions(80)]
    decoded, simulated = np.array([(shop.decoded_s(r), shop.simulated_s(r)) for r in solutions]).T
    assert np.median(np.abs(decoded / simulated - 1)) < 0.01
    assert np.corrcoef(decoded, simulated)[0, 1] > 0.9


def test_annealing_finds_better_solutions() -> None:
    shop = Workshop(independent())
    start = shop.solutions(1)[0]
    worse = replace(start, order=start.order[::-1])
    rng, weights = np.random.default_rng(0), np.ones(len(shop.modes))
    found = shop.surrogate.anneal([worse], weights, 20_000, NO_FUSE, 8, rng)
    values = [shop.surrogate.value_s(r) for r in found]
    assert values == sorted(values)
    assert values[0] < shop.surrogate.value_s(worse)
    assert shop.surrogate.judged > 100


def test_compiling_ahead_compiles_what_is_used() -> None:
    compile_ahead()
    before = len(anneal.signatures)
    shop = Workshop(independent())
    rng, weights = np.random.default_rng(0), np.ones(len(shop.modes))
    shop.surrogate.anneal(shop.solutions(1), weights, 20, NO_FUSE, 1, rng)
    assert len(anneal.signatures) == before


def test_a_solution_is_given_up_only_if_it_is_worse_than_allowed() -> None:
    shop = Workshop(dependent(), scenarios=2)
    tables, scenarios = shop.surrogate.tables, shop.problem.scenarios
    assert len(scenarios) == 2
    for solution in shop.solutions(40):
        whole = shop.surrogate.value_s(solution)
        encoded = shop.surrogate.encode(solution)
        least_s = np.zeros(2)
        assert value_s(tables, encoded, whole * 1.0001, least_s) == pytest.approx(whole)
        assert value_s(tables, encoded, whole * 0.999, np.zeros(2)) == NEVER
        known_s = np.full(2, 0.5 * whole)
        value_s(tables, encoded, NEVER, known_s)
        assert (known_s <= 0.5 * whole).all()


def test_a_plan_becomes_a_solution_for_the_same_plan() -> None:
    """Who waits for a pair of devices waits again, and whoever shared a pair shares one again."""
    shop = Workshop(independent())
    for solution in shop.solutions(60):
        for strict in (False, True):
            fixed = replace(solution, splits=(), strict=strict, grow=False)
            plan = shop.builder.build(fixed)
            planned_s = shop.simulator.simulate_scenario(plan, 0).makespan_s
            again = [replace(r, grow=False) for r in solutions_of(shop.problem, plan)]
            assert min(shop.simulated_s(r) for r in again) <= planned_s * (1 + 1e-9), fixed


def test_scenarios_are_scaled_by_the_smallest_and_the_largest_configuration() -> None:
    """Twice the tokens take twice the time here, so that nothing is lost by it."""
    engine = EngineOptions(max_num_seqs=1, async_scheduling=False)
    nodes = [
        TestNode(name, [4] * n, [[k] * n, [2 * k - 1] * n, [3 * k - 2] * n], engine=engine)
        for name, n, k in (("a", 24, 9), ("b", 48, 5))
    ]
    problem = make_problem(nodes, num_gpus=4, num_scenarios=3)
    simulator = PlanSimulator(problem)
    modes = timed(problem)
    whole = Surrogate(problem, simulator, range(3), modes, pairs=True)
    few = Surrogate(problem, PlanSimulator(problem), range(3), modes, pairs=True, full=1)
    np.testing.assert_allclose(few.tables.work_s, whole.tables.work_s, rtol=0.1)
    np.testing.assert_allclose(few.tables.work_s[0], whole.tables.work_s[0])
    np.testing.assert_allclose(few.tables.work_s[:, [0, 3], -1], whole.tables.work_s[:, [0, 3], -1])
    assert not np.allclose(whole.tables.work_s[1], whole.tables.work_s[0], rtol=0.3)


@pytest.mark.parametrize("cores", [{0}, {0, 1}])
def test_chains_count_their_work_and_not_time(
    cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    shop = Workshop(independent())
    start = shop.surrogate.encode(shop.solutions(1)[0])

    def run(fuse_s: float) -> list[Chain]:
        return annealing_chains(
            shop.surrogate.tables,
            start,
            float(value_s(shop.surrogate.tables, start, NEVER, np.zeros(1))),
            np.zeros(1),
            np.ones(len(shop.modes)),
            np.array(MOMENTS),
            8000,
            fuse_s,
            4,
            np.random.default_rng(0),
        )

    chains = run(NO_FUSE)
    assert len(chains) == len(HEATS)
    assert [c.judged for c in chains] == [4000, 4000]
    for chain, again in zip(chains, run(NO_FUSE), strict=True):
        np.testing.assert_array_equal(chain.columns, again.columns)
        value, best = chain.best()
        assert value == chain.value_s.min()
        assert value_s(shop.surrogate.tables, best, NEVER, np.zeros(1)) == pytest.approx(value)
    assert all(c.judged == 0 for c in run(monotonic() - 1.0))


def test_what_is_planned_for_the_end_of_two_models_waits_for_both() -> None:
    """In the second world they finish in the other order; the third grows all the same."""
    nodes = [
        serial("a", 1, 40),
        serial("b", 1, 44),
        serial("c", 40, 25, load_s=1.0),
    ]
    problem = make_problem(nodes, num_gpus=4, nvlink=1, num_scenarios=1)
    (first,) = problem.scenarios
    a, b, c = first.output_tokens
    swapped = LengthScenario(first.prompt_tokens, (b, a, c))
    simulator = PlanSimulator(problem.with_scenarios((first, swapped)))
    modes = [offered(problem, i) for i in range(3)]
    one, two = ParallelConfig(1), ParallelConfig(2)
    builder = Builder(problem, simulator, 0, modes)
    plan = builder.build(Solution((0, 1, 2), (one, one, two), (0.0, 0.0, 0.0), grow=True))
    assert all(s.end.kind != "first_finisher" for s in plan.stages)
    planned, other = (simulator.simulate_scenario(plan, s) for s in (0, 1))
    assert any(len(s.devices) == 4 for s in planned.segments if s.node == "c")
    assert other.makespan_s == pytest.approx(planned.makespan_s, rel=0.02)


def test_a_model_grows_onto_another_kind_of_gpu() -> None:
    """Replicas of two devices have costs on the kind that is joined in pairs only."""
    slow, fast = Gpu("slow", 2**36), Gpu("fast", 2**36)
    base = make_problem([serial(n, 8, k, sizes=(1, 2)) for n, k in (("a", 40), ("b", 5))], 2)
    costs = []
    for one, two in (of_node.values() for of_node in base.costs):
        costs.append({ModeKey("slow", 1): one, ModeKey("fast", 1): one, ModeKey("fast", 2): two})
    cluster = Cluster((slow, fast, fast), ((0,), (1, 2)))
    problem = Problem(base.app, cluster, base.scenarios, tuple(costs))
    modes = (ParallelConfig(1), ParallelConfig(1, 2))
    plan = Workshop(problem).builder.build(Solution((1, 0), modes, (0.0, 0.0), grow=True))
    assert verify(problem, plan) == ()
    assert [a.devices for s in plan.stages for a in s.assignments if a.node == "a"] == [
        (0,),
        (1, 2),
    ]


def with_shared_engines() -> Problem:
    """Two nodes of one model and two others on two devices."""
    nodes = [
        serial("a", 4, 10),
        serial("b", 4, 11, load_s=30.0),
        serial("c", 4, 20),
        serial("d", 2, 5, load_s=30.0),
    ]
    return replace(make_problem(nodes, num_gpus=2), engine_of=(0, 1, 2, 1))


def test_engines_that_are_taken_over_are_decoded() -> None:
    """Only d, right after b, needs no start."""
    shared = Workshop(with_shared_engines())
    apart = Workshop(shared.problem.without_shared_engines())
    one = (ParallelConfig(1),) * 4
    for order in ((0, 1, 2, 3), (0, 1, 3, 2), (1, 2, 0, 3), (1, 2, 3, 0)):
        solution = Solution(order, one, (0.0,) * 4, grow=False)
        for shop in (shared, apart):
            decoded_s = shop.decoded_s(solution)
            assert decoded_s == pytest.approx(shop.simulated_s(solution), rel=1e-6), order
    assert shared.decoded_s(solution) < apart.decoded_s(solution)


def test_patient_models_wait_for_engines() -> None:
    """d could start beside b, when a has finished, but is done sooner with b's engine."""
    shop = Workshop(with_shared_engines())
    one = (ParallelConfig(1),) * 4
    hasty = Solution((0, 1, 3, 2), one, (0.0,) * 4, grow=False)
    patient = replace(hasty, patient=True)
    assert shop.surrogate.solution(shop.surrogate.encode(patient)) == patient
    assert shop.decoded_s(patient) == pytest.approx(shop.simulated_s(patient), rel=1e-6)
    assert shop.decoded_s(patient) < shop.decoded_s(hasty)
    plan = shop.builder.build(patient)
    trace = shop.simulator.simulate_scenario(plan, 0)
    ends = {s.node: s.end_s for s in trace.segments}
    (begins,) = (s.start_s for s in trace.segments if s.node == "d")
    assert begins == pytest.approx(ends["b"])
