"""An anytime search on the simulated makespan."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

import numpy as np

from samullm_auto.builder import Builder
from samullm_auto.moves import Moves, offered
from samullm_auto.pace import Pace
from samullm_auto.recipe import Recipe, list_recipes, recipes_of
from samullm_auto.risk import Risk
from samullm_auto.surrogate import Surrogate, ends_of
from samullm_plugin import ParallelConfig, Plan, Problem
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.model.types import Floats
from samullm_plugin.rules.bounds import lower_bound

PATIENCE = 0.001
"""Share of the makespan that searching without a gain may take."""

CLOSE_ENOUGH = 1e-4
"""Relative gap to the bound below which there is nothing to search for."""

PROMISING = 0.01
"""A plan worse than the best by this share in one scenario is not simulated in the others."""

SURROGATE_SHARE, JUDGED_PER_NODE = 0.5, 10_000
"""Share of the search time that goes to the surrogate, and recipes it judges per node, at most."""

TIMING_SHARE = 0.3
"""Share of the time that timing every model in every configuration may take."""

SEARCHED_ON, SIMULATIONS = 4, 20
"""Length scenarios that are searched on, at most; simulations of whole plans in all of them for
which the time should suffice."""

CHEAP_S = 0.2
"""Seconds of simulating that are spent even if the plan takes less: one scenario of several is not
what the plan is asked for."""

LISTED, SIMULATED_BEST, ELITE = 2, 12, 4
"""List schedules, and recipes the surrogate likes best, that are simulated; recipes whose
neighbours are tried."""

GAIN = 1e-4
"""Share of the makespan that is worth searching on for."""

CLIMBING = 0.25
"""Share of the patience that is had with moves on the simulation: on the bundled applications they
gained something in one case of 26 once the surrogate had been searched."""

NEIGHBOURS = 8
"""Neighbours of which the surrogate picks the one to simulate."""


@dataclass(slots=True)
class Candidate:
    """A plan that was simulated.

    Attributes:
        plan: the plan.
        value_s: its risk-adjusted makespan in the scenarios that are searched on.
        makespan_s: per scenario.
        source: where it comes from.
        start: whether it was given rather than found.
    """

    plan: Plan
    value_s: float
    makespan_s: Floats
    source: str
    start: bool


@dataclass(slots=True)
class Log:
    """What the search did.

    Attributes:
        values: value of each start by its name.
        notes: starts that could not be had, and why.
        simulated: plans simulated.
    """

    values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    simulated: int = 0


class Purse:
    """The time that may be spent.

    Attributes:
        deadline_s: when to stop at the latest, on the clock of ``time.monotonic``.
    """

    def __init__(self, deadline_s: float, allowance_s: float) -> None:
        """Begin to spend.

        Args:
            deadline_s: see above.
            allowance_s: seconds that are worth spending; inf: all until the deadline.
        """
        self.deadline_s = deadline_s
        self.economical = allowance_s < float("inf")
        self._worth_until_s = monotonic() + allowance_s

    @property
    def left_s(self) -> float:
        """Return the seconds left to spend."""
        return min(self.deadline_s, self._worth_until_s) - monotonic()

    @property
    def until_deadline_s(self) -> float:
        """Return the seconds left until the deadline, at least 0."""
        return max(0.0, self.deadline_s - monotonic())

    def earn(self, saved_s: float) -> None:
        """Let half of what a better plan saves be spent on searching on."""
        self._worth_until_s += 0.5 * saved_s

    def patience_s(self, value_s: float) -> float:
        """Return how long to search without a gain."""
        return float(np.clip(PATIENCE * value_s, 0.1, 1.5)) if self.economical else float("inf")


class Search:
    """Improves on the best of several plans until it is optimal, time is up, or it does not pay.

    Attributes:
        best: the best plan so far in the scenarios that are searched on.
        bound_s: no plan is better there.
        log: what was done.
        purse: the time it may take.
        num_scenarios: how many of the problem's scenarios it searches on.
        num_timed: in how many of them models were timed in all configurations it considers.
        untimed_s: about how long timing them in the others takes, per scenario.
        pairs_s: about how long timing consumers behind their producers takes, per scenario.
        candidates: starts, and plans that were the best when they were found.
    """

    def __init__(
        self,
        problem: Problem,
        context: SchedulingContext,
        risk: Risk,
        purse: Purse,
        pace: Pace,
    ) -> None:
        """Time the models.

        Args:
            problem: the instance.
            context: the host.
            risk: what to make small.
            purse: the time it may take.
            pace: about how long simulating takes.
        """
        self.best: Candidate | None = None
        self.log = Log()
        self.purse = purse
        self.candidates: list[Candidate] = []
        self._problem, self._context, self._risk = problem, context, risk
        cheap_s = min(CHEAP_S, purse.until_deadline_s)
        affordable = int(max(purse.left_s, cheap_s) / (SIMULATIONS * pace.plan_s))
        self.num_scenarios = min(len(problem.scenarios), SEARCHED_ON, max(1, affordable))
        self._scenarios = range(self.num_scenarios)
        bounds = [lower_bound(problem, problem.scenarios[s]).value_s for s in self._scenarios]
        self.bound_s = risk.of(np.array(bounds))
        self._seen: dict[Plan, float] = {}
        self._recipes: dict[Recipe, float] = {}
        simulator, modes_s = context.simulator, TIMING_SHARE * purse.until_deadline_s
        self._modes, one_s = self._affordable_modes(pace, modes_s)
        every = enumerate(problem.parallel_configs(i) for i in range(len(self._modes)))
        self.untimed_s = max(0.0, sum(pace.modes_s(i, c) for i, c in every) - one_s)
        most_s = max(one_s, min(modes_s, TIMING_SHARE * purse.left_s))
        self.num_timed = min(self.num_scenarios, max(1, int(most_s / one_s)))
        few_s = sum(pace.modes_s(i, ends_of(of_node)) for i, of_node in enumerate(self._modes))
        more = self.num_scenarios if few_s * self.num_scenarios < most_s else self.num_timed
        self.pairs_s = pace.pairs_s(self._modes)
        self._surrogate = Surrogate(
            problem,
            simulator,
            self._scenarios[:more],
            self._modes,
            pairs=self.pairs_s < most_s,
            full=self.num_timed,
        )
        self._moves = Moves(problem, context.rng, self._modes)
        self._builders = [Builder(problem, simulator, s, self._modes) for s in self._scenarios]

    def _affordable_modes(
        self, pace: Pace, most_s: float
    ) -> tuple[list[tuple[ParallelConfig, ...]], float]:
        """Return by node the configurations to consider, and how long simulating them takes."""
        most_devices, nodes = self._problem.cluster.num_gpus, range(len(self._problem.app.nodes))
        while True:
            modes = [offered(self._problem, i, most_devices) for i in nodes]
            seconds = sum(pace.modes_s(i, of_node) for i, of_node in enumerate(modes))
            if seconds <= most_s or most_devices <= 2:
                return modes, seconds
            most_devices //= 2

    @property
    def done(self) -> bool:
        """Return whether to stop: time is up, or incumbent and bound have met."""
        return self.purse.left_s <= 0 or self.optimal

    @property
    def optimal(self) -> bool:
        """Return whether no plan is noticeably better than the best."""
        return self.best is not None and self.best.value_s <= self.bound_s * (1 + CLOSE_ENOUGH)

    def offer(self, plan: Plan, source: str, scenario: int | None = None) -> float:
        """Simulate a plan, keep it if it is the best; return its value.

        Args:
            plan: a valid plan.
            source: where it comes from.
            scenario: for a plan that was found: simulate in this scenario first, and in the others
                only if the plan is promising there; else its value is estimated from that one.
        """
        if plan in self._seen:
            return self._seen[plan]
        simulate = self._context.simulator.simulate_scenario
        order = list(self._scenarios)
        makespans: Floats = np.zeros(len(order))
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
        found = Candidate(plan, value, makespans, source, scenario is None)
        better = self.best is None or value < self.best.value_s
        if better or found.start:
            self.candidates.append(found)
        if better:
            if self.best is not None and not found.start:
                self.purse.earn(self.best.value_s - value)
            self.best = found
            if self._context.progress is not None:
                self._context.progress(self.bound_s, value)
        return value

    def begin(self) -> None:
        """Offer the first plans: list schedules that the surrogate likes."""
        recipes = list_recipes(self._problem.app, self._modes, self._surrogate)
        for recipe in recipes[:LISTED]:
            if self.best is None or not self.done:
                plan = self._builders[0].build(recipe)
                self._recipes[recipe] = self.offer(plan, "list schedule")

    def improve(self) -> None:
        """Search from what has been offered so far: on the surrogate, then on the simulation."""
        while not self.done and self._anneal():
            pass
        self._climb()

    def _anneal(self) -> bool:
        """Search on the surrogate, simulate what it likes best; return whether that was a gain."""
        assert self.best is not None
        before_s = self.best.value_s
        plans = sorted(self._seen, key=self._seen.__getitem__)[:ELITE]
        starts = [*self._recipes, *(r for plan in plans for r in recipes_of(self._problem, plan))]
        self._look()
        spend_s = min(SURROGATE_SHARE * self.purse.left_s, 1.5 * self.purse.patience_s(before_s))
        found = self._surrogate.anneal(
            starts,
            self._moves.weights,
            monotonic() + spend_s,
            JUDGED_PER_NODE * len(self._modes),
            SIMULATED_BEST,
            self._context.rng,
        )
        for recipe in found:
            if self.done:
                break
            self._try(recipe)
        return self.best.value_s < before_s * (1 - GAIN)

    def _look(self) -> None:
        """Let moves look where the best plan's devices are held."""
        assert self.best is not None
        self._moves.focus(self._context.simulator.simulate_scenario(self.best.plan, 0))

    def _try(self, recipe: Recipe) -> float:
        """Build and judge a recipe."""
        value = self._recipes.get(recipe)
        if value is None:
            scenario = int(self._context.rng.integers(len(self._builders)))
            plan = self._builders[scenario].build(recipe)
            value = self.offer(plan, "search", scenario)
            self._recipes[recipe] = value
        return value

    def _climb(self) -> None:
        """Improve the best recipes move by move on the simulation, as long as it pays."""
        rng = self._context.rng
        elite = sorted(self._recipes, key=self._recipes.__getitem__)[:ELITE]
        last_gain_s, tried = monotonic(), 0
        while not self.done:
            assert self.best is not None
            before = self.best.value_s
            if monotonic() - last_gain_s > CLIMBING * self.purse.patience_s(before):
                return
            parent = elite[int(len(elite) * rng.random() ** 2)]
            neighbour = self._moves.draw(parent)
            if rng.random() < 0.7:  # of several, the one the surrogate likes best
                several = [neighbour, *(self._moves.draw(parent) for _ in range(NEIGHBOURS - 1))]
                fresh = [r for r in several if r not in self._recipes]
                neighbour = min(fresh, key=self._surrogate.value_s, default=neighbour)
            if neighbour in self._recipes:
                tried += 1
                if tried > 200:  # the neighbourhood is exhausted
                    return
                continue
            tried = 0
            value = self._try(neighbour)
            if value < before * (1 - GAIN):
                last_gain_s = monotonic()
                self._look()
            if value < self._recipes[elite[-1]]:
                elite = sorted({*elite, neighbour}, key=self._recipes.__getitem__)[:ELITE]
