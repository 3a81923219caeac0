"""Registers the default scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from samullm_auto.budget import Budget
from samullm_auto.neighbourhood import compile_ahead
from samullm_auto.risk import Risk, RiskMeasure
from samullm_auto.search import CLOSE_ENOUGH, Candidate, Search
from samullm_auto.selection import (
    CONTENDERS,
    NEAR_COARSE,
    Elsewhere,
    confirm,
    contenders_of,
    explain,
    select_on_holdout,
    simplest,
)
from samullm_plugin import Plan, Problem, SamullmError, StageScheduler, hookimpl
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.model.result import PlanStatus
from samullm_plugin.simulator import PlanSimulator

Start = tuple[str, dict[str, object]]

HEURISTICS: tuple[Start, ...] = (("min-heuristic", {}), ("max-heuristic", {}), ("greedy", {}))

GREEDY: tuple[Start, ...] = (
    ("greedy", {"preemption": False}),
    ("greedy", {"objective": "corrected"}),
    ("greedy", {"objective": "tokens"}),
)

GREEDY_UP_TO, GREEDY_SHARE, GREEDY_STEP_S = 2000, 0.3, 2e-4
"""Nodes times GPUs up to which greedy is asked; share of the allowance that each of its variants
may take; reference seconds of a step that greedy considers, beside simulating."""

WORTH, WORTH_SHORT, SHORT_S, WORTH_S = 0.006, 0.01, 0.3, 30.0
"""Share of the lower bound that searching may take before it has saved anything; in short runs so
much more, up to so many seconds; and at most in all."""

FAR_OFF = 0.04
"""Share of what a plan takes beyond twice the bound that is surely to be saved by searching."""

EXACT_NODES_PER_S, EXACT_S, EXACT_MOST_S = 400_000, 0.4, 5.0
"""Nodes of branch and bound in a second; least and most reference seconds that exact may take."""

SOLVER_LIMIT, SOLVER_SHARE = 0.2, 0.1
"""Deterministic time that CP-SAT may take after that, or so much of the reference seconds, if that
is more: of a large model a unit may take a minute (eleven nodes: 0.2 took 2 s, 0.37 took 24)."""

EXACT_SIMULATIONS = 60
"""Schedules that exact may simulate whatever that takes."""

PAIRS_S, PAIRS_SHARE = 4.0, 0.1
"""Reference seconds of timing all pairs of modes beyond which exact is not asked, or so much of
what the best plan takes beyond the bound, if that is more."""

FUSE, FUSE_S = 100.0, 600.0
"""How many times the allowance the clock may show before it ends a search without a limit of its
own, and at least so many seconds."""

POLICY_GAIN = 0.01
"""Share of the makespan that a request policy must save to be chosen."""

SHARING_GAIN, HOPELESS = 0.005, 0.05
"""Share of the makespan that sharing engines must save to be chosen; and by which the first plans
may be longer than what they have to beat for the search to go on."""


class AutoOptions(BaseModel):
    """Options of ``auto``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_s: float | None = Field(
        default=None,
        gt=0,
        description="reference seconds of searching, at most; none: what is at stake decides, "
        "unless the host has a budget",
    )
    economical: bool = Field(
        default=True,
        description="stop when searching on is likely to cost more than it saves; false: only when "
        "the budget is spent or nothing is found any more, for plans that are made ahead",
    )
    risk: RiskMeasure = Field(
        default="mean", description="what of the scenarios' makespans is made small"
    )
    level: float = Field(default=0.9, gt=0, lt=1, description="level of quantile and cvar")
    exact_up_to: int = Field(
        default=192,
        ge=0,
        description="nodes times GPUs up to which the scheduler exact is asked as well",
    )


class AutoScheduler(StageScheduler):
    """The best plan found for the work it is worth, by the host's simulation.

    Starts from the plans of the other schedulers and improves on them by a search over the order of
    models, their configurations, when consumers start, and models resized on the way. It never
    returns worse than any of its starts, and stops when its plan meets the lower bound, when the
    budget is spent, or when searching on would cost more than it saves. Work is counted, not
    time, so a seed gives the same plan whatever else the machine does. Where there are very many
    requests, candidates are judged on aggregated ones, and the best are simulated whole.
    """

    name: ClassVar[str] = "auto"
    Config: ClassVar[type[BaseModel]] = AutoOptions

    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return the best plan found; see the class."""
        options = self.config
        assert isinstance(options, AutoOptions)
        compile_ahead()
        risk = Risk(options.risk, options.level)
        found = self._search(context, risk)
        assert found is not None
        best, report, notes = found, context.report, []
        for choice in context.sharing:
            names = "; ".join(" with ".join(nodes) for nodes in choice.groups.values())
            least_s = best.value_s * (1 - SHARING_GAIN)
            if risk.of(choice.context.lower_bounds_s()) > least_s:
                notes.append(f"engines shared by {names}: cannot be shorter")
                continue
            try:
                found = self._search(choice.context, risk, best.value_s)
            except SamullmError as error:
                notes.append(f"engines shared by {names}: {error}")
                continue
            takes = "no shorter" if found is None else f"{found.value_s:.1f} s"
            notes.append(f"engines shared by {names}: {takes}, {best.value_s:.1f} s before")
            if found is not None and found.value_s < least_s:
                best, report = found, choice.context.report
                report.shared = choice.groups
        for choice in context.sharing:
            bounds = choice.context.lower_bounds_s()
            if best.value_s > risk.of(bounds) * (1 + CLOSE_ENOUGH):
                report.status = PlanStatus.HEURISTIC  # as far as is known of the others
        report.notes += notes
        context.report = report
        return best.plan

    def _search(
        self,
        context: SchedulingContext,
        risk: Risk,
        limit_s: float = float("inf"),
        share: float = 1.0,
    ) -> Candidate | None:
        """Return the best plan of a context's problem, and fill in its report.

        Args:
            context: the host.
            risk: what to make small.
            limit_s: what the plan has to beat.
            share: of a budget that is given, what it may take.

        Returns:
            None if the first plans are so far from the limit that searching is given up.
        """
        options, problem = self.config, context.simulator.problem
        assert isinstance(options, AutoOptions)
        known = None
        if context.without_pipelines is not None:  # more to choose from must not be worse
            share /= 2
            known = self._search(context.without_pipelines, risk, limit_s, share)
        simulator = context.simulator.coarse()
        bounds = context.lower_bounds_s()
        budget = _budget(options, context, float(bounds[0]), share)
        search = Search(simulator, context, risk, budget, bounds)
        search.begin()
        if known is not None:
            label = "without further pipeline stages"
            search.log.values[label] = search.offer(known.plan, label)
        self._offer_starts(search, context, options.exact_up_to)
        assert search.best is not None
        if search.best.value_s > limit_s * (1 + HOPELESS):
            return None
        if not search.done:
            search.improve()
        notes = search.log.notes
        rest = range(search.num_scenarios, len(problem.scenarios))
        elsewhere = Elsewhere(simulator, rest, risk)
        best = select_on_holdout(search.candidates, elsewhere)
        if simulator is context.simulator and not rest:
            alike = search.candidates
            best = alike[simplest([c.plan for c in alike], [c.value_s for c in alike])]
        if simulator is not context.simulator:
            best = confirm(
                best, search.candidates, elsewhere, context.simulator, search.confirmed_scenarios
            )
            notes.append(
                f"candidates were judged on {simulator.problem.app.num_requests:,} of "
                f"{problem.app.num_requests:,} requests, the best of them on all"
            )
        if budget.blown:
            notes.append("the time limit ended the search: another run may find another plan")
        judge = context.simulator
        if not search.optimal:
            best, judge = self._with_policy(best, known, search, context, risk)
        context.report.explanation.update(explain(problem, judge, best))
        context.report.notes += notes
        context.report.objective_s = best.value_s
        if search.optimal and best.value_s <= search.least_s and not rest:
            context.report.status = PlanStatus.OPTIMAL
        if context.sharing or limit_s < float("inf"):  # alike in all that are compared
            made = [judge.simulate_scenario(best.plan, s) for s in range(len(problem.scenarios))]
            best = replace(best, value_s=risk.of(np.array([t.makespan_s for t in made])))
        return best

    def _with_policy(
        self,
        best: Candidate,
        known: Candidate | None,
        search: Search,
        context: SchedulingContext,
        risk: Risk,
    ) -> tuple[Candidate, PlanSimulator]:
        """Return the candidate to carry out, and the simulator that tells how.

        That is another request policy's if some candidate takes less by enough under it. Looked at
        are the last candidates, and the one that the problem without pipeline stages has.
        """
        plans = {c.plan: c for c in contenders_of(search.candidates, NEAR_COARSE, CONTENDERS)}
        plans |= {c.plan: c for c in (known, best) if c is not None}
        scenarios = range(search.confirmed_scenarios)

        def value_s(judge: PlanSimulator, plan: Plan) -> float:
            return risk.of(
                np.array([judge.simulate_scenario(plan, s).makespan_s for s in scenarios])
            )

        if not context.with_policies:
            return best, context.simulator
        before_s = value_s(context.simulator, best.plan)
        ways = [(name, plan) for name in context.with_policies for plan in plans]
        takes_s = [value_s(context.with_policies[name], plan) for name, plan in ways]
        least = simplest([plan for _, plan in ways], takes_s)
        if takes_s[least] >= before_s * (1 - POLICY_GAIN):
            return best, context.simulator
        name, plan = ways[least]
        context.report.request_policy = name
        context.report.notes.append(
            f"request policy {name}: {before_s:.1f} s without, {takes_s[least]:.1f} s with it"
        )
        return replace(plans[plan], value_s=takes_s[least]), context.with_policies[name]

    def _offer_starts(self, search: Search, context: SchedulingContext, exact_up_to: int) -> None:
        """Let the search begin with the plans of the other schedulers.

        The heuristics are asked whatever the budget; what is left out is noted.
        """
        budget, notes = search.budget, search.log.notes
        problem = context.simulator.problem
        if context.incumbent is not None:
            search.log.values["incumbent"] = search.offer(context.incumbent, "incumbent")
        size = len(problem.app.nodes) * problem.cluster.num_gpus
        for name, options in HEURISTICS:
            if name == "greedy" and size > GREEDY_UP_TO:
                notes.append(f"greedy was left out: {size:,} nodes times GPUs are too many for it")
            elif not search.optimal:
                self._start(search, context, name, options)
        if size > exact_up_to:
            notes.append(f"exact was left out: {size:,} nodes times GPUs are over {exact_up_to:,}")
        elif search.pairs_s * search.num_timed > max(PAIRS_S, PAIRS_SHARE * search.at_stake_s):
            notes.append("exact was left out: timing all pairs of configurations takes too long")
        elif not search.optimal:
            exact_s = min(max(EXACT_S, 0.3 * budget.left_s), EXACT_MOST_S)
            one_s = search.costs.plan_s * min(search.start_scenarios, len(problem.scenarios))
            limits: dict[str, object] = {
                "workers": 1,
                "branch_nodes": int(EXACT_NODES_PER_S * exact_s),
                "deterministic_limit": max(SOLVER_LIMIT, SOLVER_SHARE * exact_s),
                "simulations": min(max(EXACT_SIMULATIONS, int(exact_s / one_s)), 300),
                "time_limit_s": 3600.0,
            }
            self._start(search, context, "exact", limits)
        assert search.best is not None
        budget.earn(FAR_OFF * max(0.0, search.best.value_s - 2 * search.bound_s))
        configs = sum(len(problem.parallel_configs(i)) for i in range(len(problem.app.nodes)))
        step_s = GREEDY_STEP_S * len(problem.scenarios)
        greedy_s = configs * len(problem.app.nodes) * step_s + 4 * search.costs.plan_s
        if greedy_s > GREEDY_SHARE * budget.left_s:
            notes.append("greedy's other variants were left out: they take longer than is at stake")
            return
        for name, options in GREEDY:
            if not search.optimal:
                self._start(search, context, name, options)

    def _start(
        self, search: Search, context: SchedulingContext, name: str, options: dict[str, object]
    ) -> None:
        """Offer another scheduler's plan, note why if there is none."""
        shown = options if name == "greedy" else {}
        label = " ".join([name, *(f"{k}={v}" for k, v in shown.items())])
        if context.schedule_with is None:
            search.log.notes.append(f"{label}: the host offers no other schedulers")
            return
        try:
            plan = context.schedule_with(
                name, options=options, budget_s=float("inf"), scenarios=search.start_scenarios
            )
        except SamullmError as error:  # not installed, or the instance is beyond it
            search.log.notes.append(f"{label}: {error}")
        else:
            search.log.values[label] = search.offer(plan, label)


def _budget(
    options: AutoOptions, context: SchedulingContext, bound_s: float, share: float
) -> Budget:
    """Return the work that may be spent, of a budget that is given a share."""
    worth_s = min(WORTH * bound_s + min(WORTH_SHORT * bound_s, SHORT_S), WORTH_S)
    limited = context.remaining_s < float("inf")
    given = [b for b in (options.budget_s, context.remaining_s if limited else None) if b]
    economical = options.economical and not given
    allowance_s = share * min(given) if given else worth_s if economical else WORTH_S
    fuse_s = monotonic() + max(FUSE_S, FUSE * allowance_s)
    return Budget(allowance_s, min(fuse_s, context.deadline_s), economical=economical)


@hookimpl
def register_schedulers(register: Callable[[type[StageScheduler]], None]) -> None:
    """Offer ``auto``."""
    register(AutoScheduler)
