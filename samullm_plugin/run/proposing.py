"""The best plan for what is left of a run, compared with going on as before."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from samullm_plugin.app.spec import Component
from samullm_plugin.errors import PlanError, PluginError
from samullm_plugin.host.interfaces.length import LengthEstimator
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.types import Floats
from samullm_plugin.planning.instances import Instance
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.planning.policies import (
    NO_POLICY,
    chosen_policy,
    named_policy,
    offered_policies,
)
from samullm_plugin.rules.transition import Running
from samullm_plugin.rules.verify import verify
from samullm_plugin.run.drift import Snapshot
from samullm_plugin.run.residual import ResidualWork, residual_problem, sample_residual
from samullm_plugin.run.residual_plans import Renumbering, aligned, residual_plan, whole_plan
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.simulator.runs import PolicyCall

logger = logging.getLogger(__name__)

PLANNING_STREAM = 31
"""Of the seed, for the lengths of what is left."""


@dataclass(frozen=True, slots=True)
class ReplanOptions:
    """When to plan again, and when to change the plan.

    Attributes:
        check_every: share of the planned makespan between checks for drift; planning at the ends
            of stages is not more frequent than half of that.
        length_drift: relative change of the expected tokens that are left from which the remaining
            problem is planned again.
        latency_drift: the same for iteration latencies.
        min_gain: share of the remaining time by which another plan must be faster, its switching
            costs included.
        scenarios: length scenarios that schedulers see of the remaining problem.
        judges: further length scenarios, by which their plans are compared: a plan made for one
            draw looks better on it than it is. The gain must also exceed its standard error.
        budget_s: seconds an anytime scheduler may search.
        also: schedulers whose plans are considered besides the run's own scheduler's, where
            plugins provide them.
    """

    check_every: float = 0.04
    length_drift: float = 0.1
    latency_drift: float = 0.1
    min_gain: float = 0.05
    scenarios: int = 1
    judges: int = 3
    budget_s: float = 0.5  # these figures are choices; benchmarks/adjusting.py shows what they give
    also: tuple[str, ...] = ("min-heuristic",)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan for what is left, compared with going on as before.

    Attributes:
        plan: the plan; None: going on is best.
        policy: name of the request policy that it is to be carried out with, by nodes that have no
            engines now; None: each node keeps its own.
        gain_s: how much earlier the run would end.
        remaining_s: how long going on as before would take.
        planning_s: seconds this took.
    """

    plan: Plan | None
    gain_s: float
    remaining_s: float
    planning_s: float
    policy: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What is to be planned: everything a thread needs.

    Attributes:
        snapshot: of the run.
        left: what is left to do.
        estimator: of lengths, with what was observed.
        plan: the run's plan.
        stage: its current stage.
        running: engines by node name, and when they are ready.
        policies: request policies by node name.
        with_engines: nodes that have engines, prepared ones included; they keep their policies.
    """

    snapshot: Snapshot
    left: ResidualWork
    estimator: LengthEstimator
    plan: Plan
    stage: int
    running: dict[str, tuple[Running, float]]
    policies: dict[str, Component | None]
    with_engines: frozenset[str]


class Proposer:
    """Plans what is left of a run.

    Args:
        host: the plugins.
        instance: the problem, and how it was planned.
        options: thresholds.
    """

    def __init__(self, host: PluginHost, instance: Instance, options: ReplanOptions) -> None:
        self._host, self._instance, self._options = host, instance, options

    def propose(self, question: Question) -> Proposal:
        """Return the best of going on and the schedulers' plans, on lengths of which none knows."""
        started = time.perf_counter()
        problem, planner = self._instance.problem, self._instance.planner
        rng = np.random.default_rng([planner.seed, PLANNING_STREAM])
        count = self._options.scenarios
        scenarios = sample_residual(
            question.left, question.estimator, rng, count + self._options.judges
        )
        rest = residual_problem(problem, question.left, scenarios[:count], question.snapshot)
        names = {n.name for n in rest.app.nodes}
        numbers = Renumbering(question.snapshot.devices)
        running = {
            n: (numbers.engines(r), ready_s)
            for n, (r, ready_s) in question.running.items()
            if n in names
        }
        engines = {n: r for n, (r, _) in running.items()}
        policy = self.policy(rest, question.policies)
        asleep = numbers.asleep(question.snapshot.asleep, rest)
        simulator = PlanSimulator(rest, policy=policy, running=running, asleep=asleep)
        going_on = numbers.residual(
            residual_plan(
                question.plan,
                question.stage,
                question.left,
                question.snapshot.status,
                {n: r for n, (r, _) in question.running.items()},
            )
        )
        judged = rest.with_scenarios(scenarios[count:])
        policy = self.policy(judged, question.policies)
        judge = PlanSimulator(judged, policy=policy, running=running, asleep=asleep)
        others = {
            name: PlanSimulator(judged, judge.cache, self.policy(judged, way), running, asleep)
            for name, way in self._choices(judged, question).items()
        }
        before = np.full(len(judged.scenarios), np.inf)  # it needs devices that are lost
        if going_on is not None:
            before = _seconds(judge, going_on)
        incumbent = None if going_on is None or verify(rest, going_on) else going_on
        best, best_s, chosen = going_on, before, None
        plans = [] if incumbent is None else [incumbent]
        for made in self._plans(rest, simulator, incumbent):
            plans += [made, aligned(made, rest, engines)]
        for candidate in dict.fromkeys(plans):
            for name, one in ((None, judge), *others.items()):
                seconds = _seconds(one, candidate)
                if seconds.mean() < best_s.mean() and not verify(rest, candidate):
                    best, best_s, chosen = candidate, seconds, name
        if best is None or going_on is None:
            took = time.perf_counter() - started
            plan = None if best is None else _of_run(best, question)
            return Proposal(plan, 0.0, float(best_s.mean()), took, chosen)
        gains = before - best_s
        gain_s, remaining_s = float(gains.mean()), float(before.mean())
        error_s = float(gains.std(ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        better = gain_s > max(self._options.min_gain * remaining_s, error_s)
        took = time.perf_counter() - started
        if not better:
            return Proposal(None, gain_s, remaining_s, took)
        return Proposal(_of_run(best, question), gain_s, remaining_s, took, chosen)

    def _plans(
        self, rest: Problem, simulator: PlanSimulator, incumbent: Plan | None
    ) -> Iterator[Plan]:
        """Yield the schedulers' plans for what is left."""
        planner = self._instance.planner
        own = planner.scheduler.type
        known = self._host.names("scheduler")
        for name in dict.fromkeys((own, *(n for n in self._options.also if n in known))):
            how = PlanningOptions(
                options=planner.scheduler.options if name == own else {},
                seed=planner.seed,
                budget_s=min(self._options.budget_s, planner.budget_s or self._options.budget_s),
                incumbent=incumbent,
            )
            try:
                yield make_plan(self._host, rest, name, how, simulator=simulator).plan
            except (PlanError, PluginError) as error:
                logger.warning("planning again with %s failed: %s", name, error)

    def policy(
        self, problem: Problem, policies: Mapping[str, Component | None]
    ) -> PolicyCall | None:
        """Return the policies of a problem's nodes as simulations and runs call them."""
        return chosen_policy(self._host, self._instance.planner, problem, policies)

    def _choices(
        self, rest: Problem, question: Question
    ) -> dict[str, Mapping[str, Component | None]]:
        """Return, by the names of request policies that may be chosen, what nodes then have."""
        if not self._instance.policy_free:
            return {}
        ways = {
            name: with_policy(question.policies, named_policy(name), question.with_engines)
            for name in (NO_POLICY, *offered_policies(rest.app))
        }
        mine = [n.name for n in rest.app.nodes]
        return {
            name: way
            for name, way in ways.items()
            if any(way[n] != question.policies[n] for n in mine)
        }


def with_policy(
    policies: Mapping[str, Component | None], chosen: Component | None, kept: frozenset[str]
) -> dict[str, Component | None]:
    """Return the nodes' policies with another one, but for nodes that keep theirs."""
    return {n: p if n in kept else chosen for n, p in policies.items()}


def _of_run(plan: Plan, question: Question) -> Plan:
    """Return a plan of the residual problem as one of the run: its devices, and its shares."""
    snapshot = question.snapshot
    plan = Renumbering(snapshot.devices).whole(plan)
    return whole_plan(plan, question.left, snapshot.status)


def _seconds(simulator: PlanSimulator, plan: Plan) -> Floats:
    """Return the seconds a plan takes in each scenario; inf if it cannot finish."""
    try:
        return np.array([t.makespan_s for t in simulator.simulate(plan)])
    except PlanError:
        return np.full(len(simulator.problem.scenarios), np.inf)
