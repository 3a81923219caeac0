"""Plans again while a run goes on, when lengths or latencies are not what the plan assumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from samullm_plugin.app.spec import Component
from samullm_plugin.errors import PlanError, PluginError, SamullmError
from samullm_plugin.host.interfaces.length import LengthEstimator
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.lengths import LengthObservations
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
from samullm_plugin.records import to_record
from samullm_plugin.rules.transition import Running
from samullm_plugin.rules.verify import verify
from samullm_plugin.run.drift import (
    DriftEstimator,
    Snapshot,
    learned,
    length_observations,
)
from samullm_plugin.run.residual import (
    Renumbering,
    ResidualWork,
    aligned,
    residual_plan,
    residual_problem,
    residual_work,
    sample_residual,
    whole_plan,
)
from samullm_plugin.run.view import Replanning, RunView
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.simulator.runs import PolicyCall

logger = logging.getLogger(__name__)


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
class _Question:
    """What is to be planned: everything a thread needs."""

    snapshot: Snapshot
    left: ResidualWork
    estimator: LengthEstimator
    plan: Plan
    stage: int
    running: dict[str, tuple[Running, float]]
    policies: dict[str, Component | None]
    with_engines: frozenset[str]


class Replanner(Replanning):
    """Adjusts a run's plan to what is observed.

    Lengths: finished requests, and running ones as censored observations, refine the estimator, and
    the requests that are left are sampled conditional on what they have generated. Latencies and
    load times: a factor per model. Planning happens in a thread beside the engines, or while a
    virtual clock stands still.
    """

    def __init__(
        self, host: PluginHost, instance: Instance, options: ReplanOptions | None = None
    ) -> None:
        """Prepare.

        Args:
            host: the plugins.
            instance: the problem, its estimator, and how it was planned.
            options: thresholds.
        """
        self.options = options or ReplanOptions()
        self.proposals: list[Proposal] = []
        self._host, self._instance = host, instance
        self._drift = DriftEstimator()
        self._believed = instance.estimator
        self._factors: tuple[float, ...] = ()
        self._interval_s = 0.0
        self._checked_s = 0.0
        self._planned_s = 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[Proposal] | None = None
        self._asked: _Question | None = None
        self._at_once = False
        self._policies: dict[str, Component | None] = {
            n.name: instance.planner.request_policy for n in instance.problem.app.nodes
        }

    def start_with_policy(self, name: str) -> None:
        """Take up the request policy of an interrupted run."""
        self._policies = _with(self._policies, named_policy(name), frozenset())

    def devices_joined(self) -> None:
        """Look at once whether the devices that have come back are of use."""
        self._at_once = True

    def replacement(self, run: RunView) -> Plan | None:
        """Return the best plan for the devices that are left; None if no scheduler has one."""
        try:
            question = self._question(run, drifted_only=False)
            if question is None:
                return None
            proposal = self._propose(question)
        except SamullmError as error:
            logger.warning("planning for the devices that are left failed: %s", error)
            return None
        self._checked_s = self._planned_s = run.now_s()
        return self._adopted(run, proposal, question)

    def begin(self, run: RunView) -> None:
        """Set the pace by the time the plan still takes."""
        self._factors = (1.0,) * len(run.problem.app.nodes)
        snapshot = self._drift.snapshot(run)
        left = residual_work(run.problem.app, snapshot)
        if left is not None:
            rng = np.random.default_rng([self._instance.planner.seed, 31])
            scenarios = sample_residual(left, self._believed, rng, 1)
            rest = residual_problem(run.problem, left, scenarios, snapshot)
            plan = residual_plan(run.plan, run.rule.stage, left, snapshot.status, {})
            simulator = PlanSimulator(rest, policy=self._policy(rest, self._policies))
            seconds = simulator.simulate_scenario(plan, 0).makespan_s
            self._interval_s = self.options.check_every * seconds
        self._checked_s = self._planned_s = run.now_s()
        if not run.executor.virtual_clock:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="replanning")

    def end(self) -> None:
        """Give up what is being planned."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def consider(self, run: RunView, *, stage_changed: bool) -> Plan | None:
        """Return a plan that is enough better than going on, if one is known by now."""
        if self._future is not None:
            return self._answer(run) if self._future.done() else None
        now_s = run.now_s()
        due = now_s - self._checked_s >= self._interval_s
        at_stage = stage_changed and now_s - self._planned_s >= self._interval_s / 2
        at_stage |= self._at_once
        if not (due or at_stage):
            return None
        self._at_once = False
        self._checked_s = now_s
        try:  # a plugin that fails here must not end the run: the plan there is goes on
            question = self._question(run, drifted_only=not at_stage)
            if question is None:
                return None
            self._planned_s, self._asked = now_s, question
            if self._pool is not None:
                self._future = self._pool.submit(self._propose, question)
                return None
            proposal = self._propose(question)
        except SamullmError as error:
            logger.warning("planning again failed: %s", error)
            return None
        return self._adopted(run, proposal, question)

    def _answer(self, run: RunView) -> Plan | None:
        future, question = self._future, self._asked
        self._future = None
        assert future is not None
        assert question is not None
        try:
            proposal = future.result()
        except SamullmError as error:
            logger.warning("planning again failed: %s", error)
            return None
        names = [n.name for n in run.problem.app.nodes]
        held = {names[i]: d.running.devices for i, d in run.engines.deployments.items()}
        before = {n: r.devices for n, (r, _) in question.running.items()}
        devices = {d for d in range(run.problem.cluster.num_gpus) if d not in run.engines.lost}
        stale = held != before or devices != set(question.snapshot.devices)
        if stale and proposal.plan is not None:
            # Engines or devices have changed since: the comparison does not hold. Devices that
            # have joined may be without work until somebody asks again.
            self._at_once = True
            return None
        return self._adopted(run, proposal, question)

    def _adopted(self, run: RunView, proposal: Proposal, question: _Question) -> Plan | None:
        self.proposals.append(proposal)
        self._believed = question.estimator
        self._factors = question.snapshot.latency_factor
        if proposal.plan is not None:
            run.log.add(
                run.now_s(),
                "plan",
                plan=to_record(proposal.plan),
                scheduler=self._instance.planner.scheduler.type,
                gain_s=proposal.gain_s,
                remaining_s=proposal.remaining_s,
                planning_s=proposal.planning_s,
                **({} if proposal.policy is None else {"request_policy": proposal.policy}),
            )
            if proposal.policy is not None:
                self._choose(run, proposal.policy)
        return proposal.plan

    def _choose(self, run: RunView, name: str) -> None:
        """Let a request policy decide for the nodes that have no engines now."""
        chosen = named_policy(name)
        self._policies = _with(self._policies, chosen, _with_engines(run))
        whole = _with(self._policies, chosen, frozenset())
        run.choose_policy(self._policy(run.problem, whole))

    def _policy(
        self, problem: Problem, policies: Mapping[str, Component | None]
    ) -> PolicyCall | None:
        return chosen_policy(self._host, self._instance.planner, problem, policies)

    def _choices(
        self, rest: Problem, question: _Question
    ) -> dict[str, Mapping[str, Component | None]]:
        """Return, by the names of request policies that may be chosen, what nodes then have."""
        if not self._instance.policy_free:
            return {}
        ways = {
            name: _with(question.policies, named_policy(name), question.with_engines)
            for name in (NO_POLICY, *offered_policies(rest.app))
        }
        mine = [n.name for n in rest.app.nodes]
        return {
            name: way
            for name, way in ways.items()
            if any(way[n] != question.policies[n] for n in mine)
        }

    def _question(self, run: RunView, *, drifted_only: bool) -> _Question | None:
        """Look at the run; return what to plan, or None if all is as expected."""
        self._drift.take_steps(run)
        snapshot = self._drift.snapshot(run)
        left = residual_work(run.problem.app, snapshot)
        if left is None:
            return None
        seen = length_observations(run, snapshot)
        estimator = learned(self._instance.estimator, seen, run.problem.app)
        if drifted_only and not self._drifted(snapshot, left, estimator, seen):
            return None
        return _Question(
            snapshot,
            left,
            estimator,
            run.plan,
            run.rule.stage,
            dict(snapshot.running),
            self._policies,
            _with_engines(run),
        )

    def _drifted(
        self,
        snapshot: Snapshot,
        left: ResidualWork,
        estimator: LengthEstimator,
        seen: list[LengthObservations],
    ) -> bool:
        """Return whether what is left looks different from what the plan was made for."""
        for new, old in zip(snapshot.latency_factor, self._factors, strict=True):
            if abs(new / old - 1.0) > self.options.latency_drift:
                return True
        if not seen:
            return False
        tokens = []
        for known in (self._believed, estimator):
            rng = np.random.default_rng(self._instance.planner.seed)
            scenario = sample_residual(left, known, rng, 1)[0]
            tokens.append(np.array([float(o.sum()) for o in scenario.output_tokens]))
        before, now = tokens
        return bool(np.abs(now - before).sum() > self.options.length_drift * before.sum())

    def _propose(self, question: _Question) -> Proposal:
        """Plan what is left and compare."""
        started = time.perf_counter()
        problem, planner = self._instance.problem, self._instance.planner
        rng = np.random.default_rng([planner.seed, 31])
        count = self.options.scenarios
        scenarios = sample_residual(
            question.left, question.estimator, rng, count + self.options.judges
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
        policy = self._policy(rest, question.policies)
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
        policy = self._policy(judged, question.policies)
        judge = PlanSimulator(judged, policy=policy, running=running, asleep=asleep)
        others = {
            name: PlanSimulator(judged, judge.cache, self._policy(judged, way), running, asleep)
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
        better = gain_s > max(self.options.min_gain * remaining_s, error_s)
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
        for name in dict.fromkeys((own, *(n for n in self.options.also if n in known))):
            how = PlanningOptions(
                options=planner.scheduler.options if name == own else {},
                seed=planner.seed,
                budget_s=min(self.options.budget_s, planner.budget_s or self.options.budget_s),
                incumbent=incumbent,
            )
            try:
                yield make_plan(self._host, rest, name, how, simulator=simulator).plan
            except (PlanError, PluginError) as error:
                logger.warning("planning again with %s failed: %s", name, error)


def _with(
    policies: Mapping[str, Component | None], chosen: Component | None, kept: frozenset[str]
) -> dict[str, Component | None]:
    """Return the nodes' policies with another one, but for nodes that keep theirs."""
    return {n: p if n in kept else chosen for n, p in policies.items()}


def _with_engines(run: RunView) -> frozenset[str]:
    """Return the nodes that have engines, prepared ones included."""
    names = [n.name for n in run.problem.app.nodes]
    return frozenset({names[i] for i in run.engines.deployments} | set(run.engines.prepared))


def _of_run(plan: Plan, question: _Question) -> Plan:
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
