"""Registers the default scheduler."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from samullm_auto.explain import explain
from samullm_auto.risk import Risk, RiskMeasure
from samullm_auto.search import Search
from samullm_plugin import Plan, Problem, SamullmError, StageScheduler, hookimpl
from samullm_plugin.core.result import PlanStatus
from samullm_plugin.interfaces.scheduler import SchedulingContext

Start = tuple[str, dict[str, object]]

HEURISTICS: tuple[Start, ...] = (("min-heuristic", {}), ("max-heuristic", {}))

EXACT_SHARE, HEURISTICS_SHARE, GREEDY_SHARE = 0.5, 0.2, 0.15
"""Share of the time left that each of the other schedulers may take."""

SPEND, SPEND_AFTER_EXACT = 0.006, 0.002
"""Share of the makespan that searching on may take; less is left to find after exact."""

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
        deadline_s = min(monotonic() + options.budget_s, context.deadline_s)
        search = Search(problem, context, Risk(options.risk, options.level), deadline_s)
        if context.incumbent is not None:
            search.log.values["incumbent"] = search.offer(context.incumbent, "incumbent")
        size = len(problem.app.nodes) * problem.cluster.num_gpus
        per_scenario_s = _simulating_all_modes_s(problem, context)
        exact_s = EXACT_SHARE * search.left_s
        affordable = max(1, int(exact_s / per_scenario_s))
        if size <= options.exact_up_to and per_scenario_s < 1.5 * exact_s:
            self._start(search, context, "exact", {}, exact_s, affordable)
        certain = search.best is not None
        share_s = HEURISTICS_SHARE * search.left_s
        took_s = 0.0
        for start in HEURISTICS:
            if search.best is None or not search.done:
                took_s = max(took_s, self._start(search, context, *start, share_s))
        if search.best is None:
            search.offer(search.simplest(), "one after the other")
        search.limit(SPEND_AFTER_EXACT if certain else SPEND)
        for start in GREEDY:  # each takes about as long as the slower heuristic, or twice that
            if not search.optimal and took_s < GREEDY_SHARE * search.left_s:
                took_s = self._start(search, context, *start, search.left_s / 2)
        if not search.done:
            search.improve()
        best = search.best
        assert best is not None
        context.report.explanation.update(explain(problem, context, best))
        context.report.objective_s = best.value_s
        if search.optimal:
            context.report.status = PlanStatus.OPTIMAL
        return best.plan

    def _start(
        self,
        search: Search,
        context: SchedulingContext,
        name: str,
        options: dict[str, object],
        budget_s: float,
        scenarios: int | None = None,
    ) -> float:
        """Offer another scheduler's plan, note why if there is none; return the seconds it took."""
        label = " ".join([name, *(f"{k}={v}" for k, v in options.items())])
        began_s = monotonic()
        if context.schedule_with is None:
            search.log.notes.append(f"{label}: the host offers no other schedulers")
            return 0.0
        try:
            plan = context.schedule_with(
                name, options=options, budget_s=max(budget_s, 0.05), scenarios=scenarios
            )
        except SamullmError as error:  # not installed, or the instance is beyond it
            search.log.notes.append(f"{label}: {error}")
        else:
            search.log.values[label] = search.offer(plan, label)
        return monotonic() - began_s


def _simulating_all_modes_s(problem: Problem, context: SchedulingContext) -> float:
    """Return about how long simulating every model in every configuration takes, per scenario.

    Measured on every model's smallest configuration.
    """
    configs = [problem.parallel_configs(i) for i in range(len(problem.app.nodes))]
    began_s = monotonic()
    context.simulator.alone_many_s(0, [(i, c[0]) for i, c in enumerate(configs)])
    one_s = monotonic() - began_s
    requests = [len(node.requests) for node in problem.app.nodes]
    all_modes = sum(n * len(c) for n, c in zip(requests, configs, strict=True))
    return max(one_s, 1e-4) * all_modes / sum(requests)


@hookimpl
def register_schedulers(register: Callable[[type[StageScheduler]], None]) -> None:
    """Offer ``auto``."""
    register(AutoScheduler)
