"""Plans again while a run goes on, when lengths or latencies are not what the plan assumed."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from samullm_plugin.app.spec import Component
from samullm_plugin.errors import SamullmError
from samullm_plugin.host.interfaces.length import LengthEstimator
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.lengths import LengthObservations
from samullm_plugin.model.plan import Plan
from samullm_plugin.planning.instances import Instance
from samullm_plugin.planning.policies import (
    named_policy,
)
from samullm_plugin.records import to_record
from samullm_plugin.run.drift import (
    DriftEstimator,
    Snapshot,
    learned,
    length_observations,
)
from samullm_plugin.run.proposing import (
    PLANNING_STREAM,
    Proposal,
    Proposer,
    Question,
    ReplanOptions,
    with_policy,
)
from samullm_plugin.run.residual import (
    ResidualWork,
    residual_problem,
    residual_work,
    sample_residual,
)
from samullm_plugin.run.residual_plans import residual_plan
from samullm_plugin.run.view import Replanning, RunView
from samullm_plugin.simulator import PlanSimulator

logger = logging.getLogger(__name__)


class Replanner(Replanning):
    """Adjusts a run's plan to what is observed.

    Lengths: finished requests, and running ones as censored observations, refine the estimator, and
    the requests that are left are sampled conditional on what they have generated. Latencies and
    load times: a factor per model. Planning happens in a thread beside the engines, or while a
    virtual clock stands still.

    Attributes:
        options: thresholds.
        proposer: plans what is left.
        proposals: what it has found, but for answers that came too late.
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
        self._instance = instance
        self.proposer = Proposer(host, instance, self.options)
        self._drift = DriftEstimator()
        self._believed = instance.estimator
        self._factors: tuple[float, ...] = ()
        self._interval_s = 0.0
        self._checked_s = 0.0
        self._planned_s = 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[Proposal] | None = None
        self._asked: Question | None = None
        self._at_once = False
        self._policies: dict[str, Component | None] = {
            n.name: instance.planner.request_policy for n in instance.problem.app.nodes
        }

    def start_with_policy(self, name: str) -> None:
        """Take up the request policy of an interrupted run."""
        self._policies = with_policy(self._policies, named_policy(name), frozenset())

    def devices_joined(self) -> None:
        """Look at once whether the devices that have come back are of use."""
        self._at_once = True

    def replacement(self, run: RunView) -> Plan | None:
        """Return the best plan for the devices that are left; None if no scheduler has one."""
        try:
            question = self._question(run, drifted_only=False)
            if question is None:
                return None
            proposal = self.proposer.propose(question)
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
            rng = np.random.default_rng([self._instance.planner.seed, PLANNING_STREAM])
            scenarios = sample_residual(left, self._believed, rng, 1)
            rest = residual_problem(run.problem, left, scenarios, snapshot)
            plan = residual_plan(run.plan, run.rule.stage, left, snapshot.status, {})
            simulator = PlanSimulator(rest, policy=self.proposer.policy(rest, self._policies))
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
                self._future = self._pool.submit(self.proposer.propose, question)
                return None
            proposal = self.proposer.propose(question)
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

    def _adopted(self, run: RunView, proposal: Proposal, question: Question) -> Plan | None:
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
        self._policies = with_policy(self._policies, chosen, _with_engines(run))
        whole = with_policy(self._policies, chosen, frozenset())
        run.choose_policy(self.proposer.policy(run.problem, whole))

    def _question(self, run: RunView, *, drifted_only: bool) -> Question | None:
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
        return Question(
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


def _with_engines(run: RunView) -> frozenset[str]:
    """Return the nodes that have engines, prepared ones included."""
    names = [n.name for n in run.problem.app.nodes]
    return frozenset({names[i] for i in run.engines.deployments} | set(run.engines.prepared))
