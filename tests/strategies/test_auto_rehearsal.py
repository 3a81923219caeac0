"""Rehearsals agree with the plans that are built from the same recipes, and annealing uses them."""

from __future__ import annotations

from time import monotonic

import numpy as np
import pytest
from samullm_auto.annealing import anneal, compile_ahead
from samullm_auto.builder import Builder
from samullm_auto.moves import Moves, offered
from samullm_auto.recipe import Recipe, list_recipes
from samullm_auto.rehearsal import NEVER, rehearse
from samullm_auto.surrogate import Surrogate

from samullm_plugin.core.application import EngineOptions
from samullm_plugin.core.problem import Problem
from samullm_plugin.core.simulation import PlanSimulator
from samullm_plugin.core.verify import verify
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

    def __init__(self, problem: Problem) -> None:
        self.problem, self.simulator = problem, PlanSimulator(problem)
        self.modes = [
            offered(problem, i, problem.cluster.num_gpus) for i in range(len(problem.app.nodes))
        ]
        self.surrogate = Surrogate(problem, self.simulator, [0], self.modes, pairs=True)
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
