"""An anytime search on the simulated makespan."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from samullm_auto.builder import Builder
from samullm_auto.moves import Moves
from samullm_auto.recipe import Recipe, recipe_of
from samullm_auto.risk import Risk
from samullm_auto.surrogate import Surrogate
from samullm_plugin import Plan, Problem
from samullm_plugin.core.bounds import lower_bound
from samullm_plugin.interfaces.scheduler import SchedulingContext

CLOSE_ENOUGH = 1e-4
"""Relative gap to the bound below which there is nothing to search for."""

JUDGED_PER_NODE = 3000
"""Recipes the surrogate judges, per node, at most."""

PROMISING = 0.01
"""A plan worse than the best by this share in one scenario is not simulated in the others."""

SURROGATE_SHARE = 0.3
"""Share of the search time that goes to the surrogate, at most."""


@dataclass(slots=True)
class Incumbent:
    """The best plan so far.

    Attributes:
        plan: the plan.
        value_s: its risk-adjusted makespan.
        makespan_s: per scenario.
        source: where it comes from.
    """

    plan: Plan
    value_s: float
    makespan_s: NDArray[np.float64]
    source: str


@dataclass(slots=True)
class Log:
    """What the search did.

    Attributes:
        values: value of each start by its name.
        notes: starts that could not be had, and why.
        simulated: plans simulated.
        surrogate: recipes the surrogate judged.
    """

    values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    simulated: int = 0
    surrogate: int = 0


class Search:
    """Improves on the best of several plans until it is optimal, time is up, or it does not pay.

    Attributes:
        best: the best plan so far.
        bound_s: no plan is better.
        log: what was done.
    """

    def __init__(
        self, problem: Problem, context: SchedulingContext, risk: Risk, deadline_s: float
    ) -> None:
        """Prepare.

        Args:
            problem: the instance.
            context: the host.
            risk: what to make small.
            deadline_s: when to stop, on the clock of ``time.monotonic``.
        """
        self.best: Incumbent | None = None
        self.log = Log()
        self._problem, self._context, self._risk = problem, context, risk
        self._hard_deadline_s = self._deadline_s = deadline_s
        bounds = [lower_bound(problem, s).value_s for s in problem.scenarios]
        self.bound_s = risk.of(np.array(bounds))
        self._seen: dict[Plan, float] = {}
        self._recipes: dict[Recipe, float] = {}
        self._moves = Moves(problem, context.rng)
        n = len(problem.scenarios)
        self._builders = [Builder(problem, context.simulator, s) for s in range(n)]

    @property
    def done(self) -> bool:
        """Return whether to stop: time is up, or incumbent and bound have met."""
        return self.left_s <= 0 or self.optimal

    @property
    def left_s(self) -> float:
        """Return the seconds left to search."""
        return min(self._deadline_s, self._hard_deadline_s) - monotonic()

    @property
    def optimal(self) -> bool:
        """Return whether no plan is noticeably better than the best."""
        return self.best is not None and self.best.value_s <= self.bound_s * (1 + CLOSE_ENOUGH)

    def offer(self, plan: Plan, source: str, scenario: int | None = None) -> float:
        """Simulate a plan, keep it if it is the best; return its value.

        Args:
            plan: a valid plan.
            source: where it comes from.
            scenario: simulate in this scenario first, and in the others only if the plan is
                promising there; else its value is estimated from that one.
        """
        if plan in self._seen:
            return self._seen[plan]
        simulate = self._context.simulator.simulate_scenario
        order = list(range(len(self._problem.scenarios)))
        makespans: NDArray[np.float64] = np.zeros(len(order))
        if scenario is not None and self.best is not None:
            makespans[scenario] = simulate(plan, scenario).makespan_s
            ratio = makespans[scenario] / self.best.makespan_s[scenario]
            if ratio > 1 + PROMISING:
                self._seen[plan] = ratio * self.best.value_s
                return self._seen[plan]
            order.remove(scenario)
        for s in order:
            makespans[s] = simulate(plan, s).makespan_s
        value = self._seen[plan] = self._risk.of(makespans)
        self.log.simulated += 1
        if self.best is None or value < self.best.value_s:
            if self.best is not None:  # what was saved may be spent in part on searching on
                self._deadline_s += 0.5 * (self.best.value_s - value)
            self.best = Incumbent(plan, value, makespans, source)
            if self._context.progress is not None:
                self._context.progress(self.bound_s, value)
        return value

    def limit(self, share: float) -> None:
        """From now on spend no more than a share of the makespan, and half of what it saves."""
        assert self.best is not None
        self._deadline_s = monotonic() + share * self.best.value_s

    def simplest(self) -> Plan:
        """Return the plan of each model on its smallest configuration, in topological order."""
        problem = self._problem
        order = problem.app.order
        modes = tuple(problem.parallel_configs(i)[0] for i in range(len(order)))
        return self._builders[0].build(Recipe(order, modes, (0.0,) * len(order)))

    def improve(self) -> None:
        """Search from the starts offered so far."""
        assert self.best is not None
        plans = sorted(self._seen, key=self._seen.__getitem__)[:4]
        starts = [recipe_of(self._problem, plan) for plan in plans]
        surrogate = Surrogate(self._problem, self._context.simulator, 0)
        spend_s = min(SURROGATE_SHARE * self.left_s, 2 * self._patience_s)
        for recipe in [*starts, *self._anneal(surrogate, starts, spend_s)]:
            if self.done:
                return
            self._try(recipe)
        self._climb(surrogate)

    @property
    def _patience_s(self) -> float:
        """Return how long to search without a gain: a small share of what is to be saved from."""
        assert self.best is not None
        return float(np.clip(0.004 * self.best.value_s, 0.1, 1.5))

    def _try(self, recipe: Recipe) -> float:
        """Build and judge a recipe."""
        value = self._recipes.get(recipe)
        if value is None:
            scenario = int(self._context.rng.integers(len(self._builders)))
            value = self.offer(self._builders[scenario].build(recipe), "search", scenario)
            self._recipes[recipe] = value
        return value

    def _anneal(self, surrogate: Surrogate, starts: list[Recipe], spend_s: float) -> list[Recipe]:
        """Return recipes that are good by the surrogate, best first."""
        rng = self._context.rng
        pool: dict[Recipe, tuple[float, float]] = {s: surrogate.makespan_s(s) for s in starts}
        begin_s = monotonic()
        until_s = begin_s + max(spend_s, 1e-3)
        current = min(pool, key=pool.__getitem__)
        value = pool[current]
        heat0 = 0.05 * value[0]
        most = JUDGED_PER_NODE * len(current.order)
        while (now := monotonic()) < until_s and self.log.surrogate < most:
            heat = heat0 * max(0.0, 1 - (now - begin_s) / (until_s - begin_s)) ** 2
            for _ in range(100):
                self.log.surrogate += 1
                neighbour = self._moves.simple(current)
                judged = surrogate.makespan_s(neighbour)
                worse = judged[0] - value[0] + 1e-4 * (judged[1] - value[1])
                if worse <= 0 or rng.random() < np.exp(-worse / max(heat, 1e-9)):
                    current, value = neighbour, judged
                    pool[current] = judged
        best = sorted(pool, key=pool.__getitem__)
        return best[:12]

    def _climb(self, surrogate: Surrogate) -> None:
        """Improve the best recipes move by move on the simulation, as long as it pays."""
        rng = self._context.rng
        elite = sorted(self._recipes, key=self._recipes.__getitem__)[:4]
        last_gain_s, tried = monotonic(), 0
        while not self.done and monotonic() - last_gain_s < self._patience_s:
            parent = elite[int(len(elite) * rng.random() ** 2)]
            neighbour = self._moves.any(parent)
            if rng.random() < 0.5:  # of several, the one the surrogate likes best
                several = [self._moves.simple(parent) for _ in range(12)]
                fresh = [r for r in several if r not in self._recipes]
                neighbour = min(fresh, key=surrogate.makespan_s, default=neighbour)
            if neighbour in self._recipes:
                tried += 1
                if tried > 200:  # the neighbourhood is exhausted
                    return
                continue
            tried = 0
            assert self.best is not None
            before = self.best.value_s
            value = self._try(neighbour)
            if value < before * (1 - 1e-4):
                last_gain_s = monotonic()
            if value < self._recipes[elite[-1]]:
                elite = sorted({*elite, neighbour}, key=self._recipes.__getitem__)[:4]
