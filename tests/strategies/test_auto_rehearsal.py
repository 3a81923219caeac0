"""Rehearsals agree with the plans that are built from the same recipes, and annealing uses them."""

from __future__ import annotations

import os
from time import monotonic

import numpy as np
import pytest
from samullm_auto.annealing import anneal, compile_ahead
from samullm_auto.builder import Builder
from samullm_auto.cooling import HEATS, cool
from samullm_auto.moves import Moves, offered
from samullm_auto.recipe import Recipe, list_recipes, recipes_of
from samullm_auto.rehearsal import NEVER, rehearse, value_s
from samullm_auto.surrogate import MOMENTS, Surrogate

from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.rules.verify import verify
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem


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


class Workshop:
    """All that turns a problem's recipes into figures."""

    def __init__(self, problem: Problem, scenarios: int = 1) -> None:
        problem = problem.with_scenarios(problem.scenarios[:1] * scenarios)
        self.problem, self.simulator = problem, PlanSimulator(problem)
        self.modes = [
            offered(problem, i, problem.cluster.num_gpus) for i in range(len(problem.app.nodes))
        ]
        self.surrogate = Surrogate(
            problem, self.simulator, range(scenarios), self.modes, pairs=True
        )
        self.builder = Builder(problem, self.simulator, 0, self.modes)

    def rehearsed_s(self, recipe: Recipe) -> float:
        return float(rehearse(self.surrogate.tables, self.surrogate.encode(recipe), 0, NEVER)[0])

    def simulated_s(self, recipe: Recipe) -> float:
        plan = self.builder.build(recipe)
        assert verify(self.problem, plan) == ()
        return self.simulator.simulate_scenario(plan, 0).makespan_s

    def recipes(self, count: int) -> list[Recipe]:
        """Return recipes of a random walk."""
        rng = np.random.default_rng(7)
        moves = Moves(self.problem, rng, self.modes)
        found = list_recipes(self.problem.app, self.modes, self.surrogate)[:1]
        while len(found) < count:
            found.append(moves.draw(found[-1]))
        return found


def test_without_resizing_a_rehearsal_is_the_simulation() -> None:
    shop = Workshop(independent())
    for recipe in shop.recipes(60):
        fixed = recipe.with_splits(()).with_flags(strict=False, grow=False)
        assert shop.rehearsed_s(fixed) == pytest.approx(shop.simulated_s(fixed), rel=1e-6), fixed


def test_dependent_models_run_no_later_than_rehearsed() -> None:
    """The run may start models earlier: it gives idle devices to those of later stages."""
    shop = Workshop(dependent())
    recipes = [r.with_splits(()).with_flags(strict=False, grow=False) for r in shop.recipes(80)]
    rehearsed, simulated = np.array([(shop.rehearsed_s(r), shop.simulated_s(r)) for r in recipes]).T
    assert (simulated <= rehearsed * (1 + 1e-6)).all()
    assert np.mean(np.abs(simulated - rehearsed) < 1e-6 * rehearsed) > 0.5


def test_resized_models_are_rehearsed_closely() -> None:
    shop = Workshop(independent())
    recipes = [r.with_flags(strict=False, grow=r.grow) for r in shop.recipes(80)]
    rehearsed, simulated = np.array([(shop.rehearsed_s(r), shop.simulated_s(r)) for r in recipes]).T
    assert np.median(np.abs(rehearsed / simulated - 1)) < 0.01
    assert np.corrcoef(rehearsed, simulated)[0, 1] > 0.9


def test_annealing_finds_better_recipes() -> None:
    shop = Workshop(independent())
    start = shop.recipes(1)[0]
    worse = start.with_order(start.order[::-1])
    rng, weights = np.random.default_rng(0), np.ones(len(shop.modes))
    found = shop.surrogate.anneal([worse], weights, monotonic() + 0.5, 10**9, 8, rng)
    values = [shop.surrogate.value_s(r) for r in found]
    assert values == sorted(values)
    assert values[0] < shop.surrogate.value_s(worse)
    assert shop.surrogate.judged > 100


def test_compiling_ahead_compiles_what_is_used() -> None:
    compile_ahead()
    before = len(anneal.signatures)
    shop = Workshop(independent())
    rng, weights = np.random.default_rng(0), np.ones(len(shop.modes))
    shop.surrogate.anneal(shop.recipes(1), weights, monotonic() + 1, 20, 1, rng)
    assert len(anneal.signatures) == before


def test_a_recipe_is_given_up_only_if_it_is_worse_than_allowed() -> None:
    shop = Workshop(dependent(), scenarios=2)
    tables, scenarios = shop.surrogate.tables, shop.problem.scenarios
    assert len(scenarios) == 2
    for recipe in shop.recipes(40):
        whole = shop.surrogate.value_s(recipe)
        encoded = shop.surrogate.encode(recipe)
        least_s = np.zeros(2)
        assert value_s(tables, encoded, whole * 1.0001, least_s) == pytest.approx(whole)
        assert value_s(tables, encoded, whole * 0.999, np.zeros(2)) == NEVER
        known_s = np.full(2, 0.5 * whole)
        value_s(tables, encoded, NEVER, known_s)
        assert (known_s <= 0.5 * whole).all()


def test_a_plan_becomes_a_recipe_for_the_same_plan() -> None:
    """Who waits for a pair of devices waits again, and whoever shared a pair shares one again."""
    shop = Workshop(independent())
    for recipe in shop.recipes(60):
        for strict in (False, True):
            fixed = recipe.with_splits(()).with_flags(strict=strict, grow=False)
            plan = shop.builder.build(fixed)
            planned_s = shop.simulator.simulate_scenario(plan, 0).makespan_s
            again = [
                r.with_flags(strict=r.strict, grow=False) for r in recipes_of(shop.problem, plan)
            ]
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
    modes = [offered(problem, i, 4) for i in range(2)]
    whole = Surrogate(problem, simulator, range(3), modes, pairs=True)
    few = Surrogate(problem, PlanSimulator(problem), range(3), modes, pairs=True, full=1)
    np.testing.assert_allclose(few.tables.work_s, whole.tables.work_s, rtol=0.1)
    np.testing.assert_allclose(few.tables.work_s[0], whole.tables.work_s[0])
    np.testing.assert_allclose(few.tables.work_s[:, [0, 3], -1], whole.tables.work_s[:, [0, 3], -1])
    assert not np.allclose(whole.tables.work_s[1], whole.tables.work_s[0], rtol=0.3)


@pytest.mark.parametrize("cores", [{0}, {0, 1}])
def test_all_chains_run_whatever_the_cores(
    cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    shop = Workshop(independent())
    start = shop.surrogate.encode(shop.recipes(1)[0])
    count, began = len(shop.modes), monotonic()
    chains = cool(
        shop.surrogate.tables,
        start,
        float(value_s(shop.surrogate.tables, start, NEVER, np.zeros(1))),
        np.zeros(1),
        np.ones(count),
        np.array(MOMENTS),
        monotonic() + 0.4,
        10**9,
        4,
        np.random.default_rng(0),
    )
    assert len(chains) == len(HEATS)
    assert all(chain.judged > 50 for chain in chains)
    assert 0.3 < monotonic() - began < 2.0
    for chain in chains:
        value, best = chain.best()
        assert value == chain.value_s.min()
        assert value_s(shop.surrogate.tables, best, NEVER, np.zeros(1)) == pytest.approx(value)


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
    modes = [offered(problem, i, 4) for i in range(3)]
    one, two = ParallelConfig(1), ParallelConfig(2)
    builder = Builder(problem, simulator, 0, modes)
    plan = builder.build(Recipe((0, 1, 2), (one, one, two), (0.0, 0.0, 0.0), grow=True))
    assert all(s.end.kind != "first_finisher" for s in plan.stages)
    planned, other = (simulator.simulate_scenario(plan, s) for s in (0, 1))
    assert any(len(s.devices) == 4 for s in planned.segments if s.node == "c")
    assert other.makespan_s == pytest.approx(planned.makespan_s, rel=0.02)
