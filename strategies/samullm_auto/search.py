"""A search on the simulated makespan, as long as it is worth its work."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from samullm_tasks.timing import TimedMode, one_stage, spaced

from samullm_auto.budget import Budget, Costs
from samullm_auto.builder import Builder
from samullm_auto.risk import Risk
from samullm_auto.solution import Solution, by_shape, solutions_of
from samullm_auto.surrogate import Surrogate, ends_of, list_solutions
from samullm_plugin import ParallelConfig, Plan, Problem
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.model.types import Floats
from samullm_plugin.simulator import PlanSimulator

MANY_CONFIGS, NEXT_SIZE = 16, 1.3
"""Of more configurations than the first, data-parallel sizes are offered in steps of the second."""

THINNED = (1.0, 1.3, 1.6, 2.0, 3.0, 8.0)
"""Steps that are tried where timing all configurations takes too long."""


def offered(problem: Problem, node: int, next_size: float = 1.0) -> tuple[ParallelConfig, ...]:
    """Return the configurations of a node that the search considers.

    All of them on small clusters; on large ones the data-parallel sizes 1 to 4, then in steps, and
    always the largest: sizes are thinned, never cut off.

    Args:
        problem: the instance.
        node: index of the node.
        next_size: ratio of two data-parallel sizes, at least; 1: all that the problem offers.
    """
    configs = problem.parallel_configs(node)
    ratio = max(next_size, NEXT_SIZE if len(configs) > MANY_CONFIGS else 1.0)
    every = 4 if ratio <= NEXT_SIZE else 1
    kept: set[ParallelConfig] = set()
    for same in by_shape(configs):
        last = 0
        for p in same:
            size = p.data_parallel_size
            if ratio == 1.0 or size <= every or size >= ratio * last or p is same[-1]:
                kept.add(p)
                last = size
    return tuple(p for p in configs if p in kept)


def affordable(
    problem: Problem, costs: Costs, most_s: float
) -> tuple[list[tuple[ParallelConfig, ...]], float]:
    """Return by node the configurations to consider, and the reference seconds of timing them.

    Args:
        problem: the instance.
        costs: what simulating costs.
        most_s: reference seconds that timing may take.
    """
    nodes = range(len(problem.app.nodes))
    for ratio in THINNED:
        modes = [offered(problem, i, ratio) for i in nodes]
        work_s = sum(costs.modes_s(i, of_node) for i, of_node in enumerate(modes))
        if work_s <= most_s:
            break
    return modes, work_s


def focus(problem: Problem, trace: PlanTrace) -> Floats:
    """Return how likely each node is changed: by the device time it holds in a plan, partly."""
    held = np.zeros(len(problem.app.nodes))
    for s in trace.segments:
        held[problem.app.index(s.node)] += (s.end_s - s.start_s) * len(s.devices)
    even = np.full(len(held), 1.0 / len(held))
    return 0.5 * even + 0.5 * held / held.sum() if held.sum() > 0 else even


CLOSE_ENOUGH = 1e-4
"""Relative gap to the bound below which there is nothing to search for."""

PROMISING = 0.01
"""A plan worse than the best by this share in one scenario is not simulated in the others."""

DECODED_PER_NODE, DECODED_AT_LEAST = 20_000, 400
"""Solutions that a round decodes per node, at most, and in all, at least."""

TIMING_SHARE, TIMING_S = 0.3, 1.0
"""Share of the allowance that timing every model in every configuration may take, or so many
reference seconds."""

SEARCHED_ON, SEARCHED_ON_MANY, SIMULATIONS = 4, 2, 20
"""Length scenarios that are searched on, at most, and where requests are more than
``CONFIRMED_REQUESTS``; simulations of whole plans in all of them for which the allowance should
suffice."""

CONFIRMED_REQUESTS = 200_000
"""Requests up to which the last candidates are simulated whole in all scenarios searched on."""

LISTED, SIMULATED_BEST, ELITE = 2, 12, 4
"""List schedules, and solutions the surrogate likes best, that are simulated; plans from which a
round may start."""

GAIN = 1e-4
"""Share of the makespan that is worth searching on for."""

IN_VAIN = 6
"""Rounds without a gain after which a search that is not economical ends."""

IDLE = 2
"""Rounds one after another that find only known plans after which an economical search ends."""


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
        notes: what was given up, and why.
        simulated: plans simulated.
    """

    values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    simulated: int = 0


class Search:
    """Improves on the best of several plans until it is optimal or the budget is spent.

    Attributes:
        best: the best plan so far in the scenarios that are searched on.
        bound_s: no plan is better there.
        log: what was done.
        budget: the work it may take.
        costs: what simulating and decoding cost.
        num_scenarios: how many of the problem's scenarios it searches on.
        start_scenarios: how many of them other schedulers plan for.
        confirmed_scenarios: in how many of them the last candidates are simulated whole.
        num_timed: in how many of them models were timed in all configurations it considers.
        pairs_s: reference seconds of timing consumers behind their producers, per scenario.
        candidates: starts, and plans that were the best when they were found.
    """

    def __init__(
        self,
        simulator: PlanSimulator,
        context: SchedulingContext,
        risk: Risk,
        budget: Budget,
        bound_s: Floats,
    ) -> None:
        """Time the models.

        Args:
            simulator: of the problem to search on, with aggregated requests if there are many.
            context: the host.
            risk: what to make small.
            budget: the work it may take.
            bound_s: lower bounds, one per length scenario.
        """
        self.best: Candidate | None = None
        self.log = Log()
        self.budget = budget
        self.candidates: list[Candidate] = []
        problem = simulator.problem
        self._problem, self._simulator = problem, simulator
        self._context, self._risk = context, risk
        self.costs = costs = Costs(problem)
        affordable_s = max(TIMING_S, TIMING_SHARE * budget.left_s)
        enough = int(max(budget.left_s, 0.2) / (SIMULATIONS * costs.plan_s))
        few = context.simulator.problem.app.num_requests <= CONFIRMED_REQUESTS
        most = SEARCHED_ON if few else SEARCHED_ON_MANY
        self.num_scenarios = min(len(problem.scenarios), most, max(1, enough))
        self.start_scenarios = max(most, self.num_scenarios)
        self.confirmed_scenarios = self.num_scenarios if few else 1
        self._scenarios = range(self.num_scenarios)
        self.bound_s = risk.of(bound_s[: self.num_scenarios])
        self._seen: dict[Plan, float] = {}
        self._solutions: dict[Solution, float] = {}
        self._modes, one_s = affordable(problem, costs, affordable_s)
        self.num_timed = min(self.num_scenarios, max(1, int(affordable_s / one_s)))
        few_s = sum(costs.modes_s(i, ends_of(of_node)) for i, of_node in enumerate(self._modes))
        every = few_s * self.num_scenarios < affordable_s
        timed = [
            [TimedMode.idle(problem, i, p) for p in of_node]
            for i, of_node in enumerate(self._modes)
        ]
        behind = [[of_node[k] for k in one_stage(of_node)] for of_node in timed]
        self.pairs_s = costs.pairs_s(
            [[of_node[k].parallel for k in spaced(of_node)] for of_node in behind]
        )
        offered = sum(len(problem.parallel_configs(i)) for i in range(len(self._modes)))
        if (considered := sum(map(len, self._modes))) < offered:
            self.log.notes.append(f"{considered} of {offered} parallel sizes were considered")
        if self.num_scenarios < len(problem.scenarios):
            self.log.notes.append(
                f"searched on {self.num_scenarios} of {len(problem.scenarios)} length scenarios; "
                "the others judged the last candidates"
            )
        self._surrogate = Surrogate(
            problem,
            simulator,
            self._scenarios[: self.num_scenarios if every else self.num_timed],
            timed,
            pairs=self.pairs_s < affordable_s,
            full=self.num_timed,
        )
        self._weights = np.full(len(self._modes), 1.0 / len(self._modes))
        self._builders = [Builder(problem, simulator, s, self._modes) for s in self._scenarios]

    @property
    def done(self) -> bool:
        """Return whether to stop: the budget is spent, or incumbent and bound have met."""
        return self.budget.left_s <= 0 or self.optimal

    @property
    def optimal(self) -> bool:
        """Return whether no plan is noticeably better than the best."""
        return self.best is not None and self.best.value_s <= self.least_s

    @property
    def at_stake_s(self) -> float:
        """Return what a better plan could save at most."""
        assert self.best is not None
        return self.best.value_s - self.bound_s

    @property
    def least_s(self) -> float:
        """Return the value up to which no plan is noticeably better."""
        return self.bound_s * (1 + CLOSE_ENOUGH)

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
        simulate = self._simulator.simulate_scenario
        order = list(self._scenarios)
        makespans: Floats = np.zeros(len(order))
        if scenario is not None and self.best is not None:
            makespans[scenario] = simulate(plan, scenario).makespan_s
            self.budget.spend(self.costs.plan_s)
            ratio = makespans[scenario] / self.best.makespan_s[scenario]
            if ratio > 1 + PROMISING:
                self._seen[plan] = ratio * self.best.value_s
                return self._seen[plan]
            order.remove(scenario)
        for s in order:
            makespans[s] = simulate(plan, s).makespan_s
        self.budget.spend(self.costs.plan_s * len(order))
        value = self._seen[plan] = self._risk.of(makespans)
        self.log.simulated += 1
        found = Candidate(plan, value, makespans, source, scenario is None)
        better = self.best is None or value < self.best.value_s
        if better or found.start:
            self.candidates.append(found)
        if better:
            if self.best is not None and not found.start:
                self.budget.earn(self.best.value_s - value)
            self.best = found
            if self._context.progress is not None:
                self._context.progress(self.bound_s, value)
        return value

    def begin(self) -> None:
        """Offer the first plans: list schedules that the surrogate likes."""
        solutions = list_solutions(self._problem.app, self._modes, self._surrogate)
        for solution in solutions[:LISTED]:
            plan = self._builders[0].build(solution)
            self._solutions[solution] = self.offer(plan, "list schedule")

    def improve(self) -> None:
        """Search from what has been offered so far, round by round."""
        in_vain = idle = 0
        most = 1 if self.budget.economical else IN_VAIN
        while not self.done and in_vain < most and idle < max(IDLE, most):
            before = self.log.simulated
            gained = self._round()
            # A round that found only plans that are known says nothing about searching on.
            idle = idle + 1 if self.log.simulated == before else 0
            in_vain = 0 if gained else in_vain + (idle == 0)

    def _round(self) -> bool:
        """Anneal on the surrogate, simulate what it likes best; return whether that was a gain."""
        assert self.best is not None
        before_s, budget = self.best.value_s, self.budget
        plans = sorted(self._seen, key=self._seen.__getitem__)[:ELITE]
        given = [s for plan in plans for s in solutions_of(self._problem, plan)]
        starts = [*self._solutions, *given]
        trace = self._simulator.simulate_scenario(self.best.plan, 0)
        self._weights = focus(self._problem, trace)
        one_s = self.costs.decode_s * len(self._surrogate.tables.load_s)
        steps = int(2 * budget.round_s(before_s) / one_s)  # two chains side by side
        steps = min(max(steps, DECODED_AT_LEAST), DECODED_PER_NODE * len(self._modes))
        found = self._surrogate.anneal(
            starts,
            self._weights,
            steps,
            budget.fuse_s,
            SIMULATED_BEST,
            self._context.rng,
        )
        budget.spend(0.5 * steps * one_s)
        for solution in found:
            if self.done:
                break
            self._try(solution)
        return self.best.value_s < before_s * (1 - GAIN)

    def _try(self, solution: Solution) -> float:
        """Build and judge a solution."""
        value = self._solutions.get(solution)
        if value is None:
            scenario = int(self._context.rng.integers(len(self._builders)))
            plan = self._builders[scenario].build(solution)
            value = self.offer(plan, "search", scenario)
            self._solutions[solution] = value
        return value
