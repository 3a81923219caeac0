"""Registers the default scheduler."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from samullm_auto.annealing import compile_ahead
from samullm_auto.explain import explain
from samullm_auto.judging import judge
from samullm_auto.pace import Pace
from samullm_auto.risk import Risk, RiskMeasure
from samullm_auto.search import Purse, Search
from samullm_plugin import Plan, Problem, SamullmError, StageScheduler, hookimpl
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.model.result import PlanStatus
from samullm_plugin.rules.bounds import lower_bound

Start = tuple[str, dict[str, object]]

HEURISTICS: tuple[Start, ...] = (("min-heuristic", {}), ("max-heuristic", {}))

EXACT_SHARE, HEURISTICS_SHARE, GREEDY_SHARE = 0.4, 0.15, 0.05
"""Share of the time left that each of the other schedulers may take."""

GIVE_UP_SHARE = 0.3
"""Share of the time until the deadline after which a heuristic without a plan is given up."""

WORTH, WORTH_SHORT, SHORT_S = 0.003, 0.01, 0.3
"""Share of the lower bound that planning may take before it has saved anything; in short runs so
much more, up to so many seconds."""

HEURISTIC_SCENARIOS = 2
"""Length scenarios that the heuristics see, at most; they look at times no closer than that."""

FAR_OFF = 0.04
"""Share of what a plan takes beyond twice the bound that is surely to be saved by searching."""

JUDGING, JUDGING_S = 0.001, 0.05
"""Share of the makespan that judging the last candidates may take, or so many seconds."""

GREEDY: tuple[Start, ...] = (
    ("greedy", {}),
    ("greedy", {"preemption": False}),
    ("greedy", {"objective": "corrected"}),
    ("greedy", {"objective": "tokens"}),
)


class AutoOptions(BaseModel):
    """Options of ``auto``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_s: float = Field(default=4.0, gt=0, description="seconds of searching, at most")
    economical: bool = Field(
        default=True,
        description="stop when searching on is likely to take longer than what it saves; false: "
        "use up the budget, for plans that are made ahead",
    )
    risk: RiskMeasure = Field(
        default="mean", description="what of the scenarios' makespans is made small"
    )
    level: float = Field(default=0.9, gt=0, lt=1, description="level of quantile and cvar")
    exact_up_to: int = Field(
        default=160,
        ge=0,
        description="nodes times GPUs up to which the scheduler exact is asked as well",
    )


class AutoScheduler(StageScheduler):
    """The best plan found within a few seconds, by the host's simulation.

    Starts from the plans of the other schedulers and improves on them by a search over the order of
    models, their configurations, when consumers start, and models resized on the way. It never
    returns worse than any of its starts, and stops when its plan meets the lower bound, when time
    is up, or when searching on would cost more time than it saves.
    """

    name: ClassVar[str] = "auto"
    Config: ClassVar[type[BaseModel]] = AutoOptions

    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return the best plan found; see the class."""
        options = self.config
        assert isinstance(options, AutoOptions)
        compile_ahead()
        deadline_s = min(monotonic() + options.budget_s, context.deadline_s)
        bound_s = lower_bound(problem, problem.scenarios[0]).value_s
        worth_s = WORTH * bound_s + min(WORTH_SHORT * bound_s, SHORT_S)
        purse = Purse(deadline_s, worth_s if options.economical else float("inf"))
        risk = Risk(options.risk, options.level)
        pace = Pace(problem, context.simulator)
        search = Search(problem, context, risk, purse, pace)
        search.begin()
        self._offer_starts(search, context, options.exact_up_to, pace)
        if not search.done:
            search.improve()
        assert search.best is not None
        until_s = min(deadline_s, monotonic() + max(JUDGING * search.best.value_s, JUDGING_S))
        if not options.economical:
            until_s = deadline_s
        rest = range(search.num_scenarios, len(problem.scenarios))
        best = judge(search.candidates, context.simulator, rest, risk, until_s)
        context.report.explanation.update(explain(problem, context, best.plan))
        context.report.objective_s = best.value_s
        if search.optimal and best is search.best and not rest:
            context.report.status = PlanStatus.OPTIMAL
        return best.plan

    def _offer_starts(
        self,
        search: Search,
        context: SchedulingContext,
        exact_up_to: int,
        pace: Pace,
    ) -> None:
        """Let the search begin with the plans of the other schedulers, as far as time allows."""
        purse, problem, searched = search.purse, context.simulator.problem, search.num_scenarios
        if context.incumbent is not None:
            search.log.values["incumbent"] = search.offer(context.incumbent, "incumbent")
        size = len(problem.app.nodes) * problem.cluster.num_gpus
        exact_s = EXACT_SHARE * purse.left_s
        timing_s = max(search.untimed_s + search.pairs_s, 1e-6)
        timed = min(search.num_timed, int(0.5 * exact_s / timing_s))
        if size <= exact_up_to and timed:
            self._start(search, context, "exact", {}, exact_s, timed)
        took_s = 0.0
        for start in HEURISTICS:
            if not search.optimal:
                share_s = HEURISTICS_SHARE * purse.left_s
                scenarios = min(searched, HEURISTIC_SCENARIOS)
                took_s = max(took_s, self._start(search, context, *start, share_s, scenarios))
        assert search.best is not None
        purse.earn(FAR_OFF * max(0.0, search.best.value_s - 2 * search.bound_s))
        for start in GREEDY:  # each takes about as long as the slower heuristic, or twice that
            if not search.optimal and took_s < GREEDY_SHARE * purse.left_s:
                took_s = self._start(search, context, *start, purse.left_s / 2, searched)

    def _start(
        self,
        search: Search,
        context: SchedulingContext,
        name: str,
        options: dict[str, object],
        budget_s: float,
        scenarios: int,
    ) -> float:
        """Offer another scheduler's plan, note why if there is none; return the seconds it took."""
        label = " ".join([name, *(f"{k}={v}" for k, v in options.items())])
        began_s = monotonic()
        if context.schedule_with is None:
            search.log.notes.append(f"{label}: the host offers no other schedulers")
            return 0.0
        try:
            plan = context.schedule_with(
                name,
                options=options,
                budget_s=max(budget_s, 0.05),
                give_up_s=GIVE_UP_SHARE * search.purse.until_deadline_s,
                scenarios=scenarios,
            )
        except SamullmError as error:  # not installed, or the instance is beyond it
            search.log.notes.append(f"{label}: {error}")
        else:
            search.log.values[label] = search.offer(plan, label)
        return monotonic() - began_s


@hookimpl
def register_schedulers(register: Callable[[type[StageScheduler]], None]) -> None:
    """Offer ``auto``."""
    register(AutoScheduler)
