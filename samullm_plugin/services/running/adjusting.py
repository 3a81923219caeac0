"""Plans again while a run goes on, when lengths or latencies are not what the plan assumed."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from samullm_plugin.core.plan import Assignment, Plan
from samullm_plugin.core.simulation import PlanSimulator
from samullm_plugin.core.transition import Running
from samullm_plugin.core.verify import verify
from samullm_plugin.errors import SamullmError
from samullm_plugin.interfaces.length import LengthEstimator, LengthObservations
from samullm_plugin.io.records import to_record
from samullm_plugin.manager import PluginHost
from samullm_plugin.services.instances import Instance
from samullm_plugin.services.planning import PlanningOptions, make_plan
from samullm_plugin.services.running.coordinator import Adjustments, Coordinator
from samullm_plugin.services.running.observing import Observer, Snapshot, length_observations
from samullm_plugin.services.running.remaining import (
    Remainder,
    aligned,
    remainder,
    remaining_problem,
    rest_of_plan,
    sample_remainder,
    simulate_rest,
)

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
        scenarios: length scenarios of the remaining problem.
        budget_s: seconds an anytime scheduler may search.
    """

    check_every: float = 0.04
    length_drift: float = 0.1
    latency_drift: float = 0.1
    min_gain: float = 0.02
    scenarios: int = 2
    budget_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan for what is left, compared with going on as before.

    Attributes:
        plan: the plan; None: going on is best.
        gain_s: how much earlier the run would end.
        remaining_s: how long going on as before would take.
        planning_s: seconds this took.
    """

    plan: Plan | None
    gain_s: float
    remaining_s: float
    planning_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """What is to be planned: everything a thread needs."""

    snapshot: Snapshot
    left: Remainder
    estimator: LengthEstimator
    plan: Plan
    stage: int
    running: dict[str, tuple[Running, float]] = field(default_factory=dict)


class Replanner(Adjustments):
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
        self._observer = Observer()
        self._believed = instance.estimator
        self._factors: tuple[float, ...] = ()
        self._interval_s = 0.0
        self._checked_s = 0.0
        self._planned_s = 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[Proposal] | None = None
        self._asked: _Question | None = None

    def begin(self, coordinator: Coordinator) -> None:
        """Set the pace by the planned makespan."""
        simulator = PlanSimulator(self._instance.problem)
        planned_s = simulator.simulate_scenario(coordinator.plan, 0).makespan_s
        self._interval_s = self.options.check_every * planned_s
        self._checked_s = self._planned_s = coordinator.now_s()
        self._factors = (1.0,) * len(coordinator.problem.app.nodes)
        if not coordinator.executor.virtual_clock:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="replanning")

    def end(self) -> None:
        """Give up what is being planned."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def consider(self, coordinator: Coordinator, *, stage_changed: bool) -> Plan | None:
        """Return a plan that is enough better than going on, if one is known by now."""
        if self._future is not None:
            return self._answer(coordinator) if self._future.done() else None
        now_s = coordinator.now_s()
        due = now_s - self._checked_s >= self._interval_s
        at_stage = stage_changed and now_s - self._planned_s >= self._interval_s / 2
        if not (due or at_stage):
            return None
        self._checked_s = now_s
        question = self._question(coordinator, drifted_only=not at_stage)
        if question is None:
            return None
        self._planned_s, self._asked = now_s, question
        if self._pool is not None:
            self._future = self._pool.submit(self._propose, question)
            return None
        return self._adopted(coordinator, self._propose(question), question)

    def _answer(self, coordinator: Coordinator) -> Plan | None:
        future, question = self._future, self._asked
        self._future = None
        assert future is not None
        assert question is not None
        try:
            proposal = future.result()
        except SamullmError as error:
            logger.warning("planning again failed: %s", error)
            return None
        held = {n: r.devices for n, r in coordinator.rule.running.items()}
        before = {n: r.devices for n, (r, _) in question.running.items()}
        if held != before and proposal.plan is not None:
            return None  # engines have started or ended since: the comparison does not hold
        return self._adopted(coordinator, proposal, question)

    def _adopted(
        self, coordinator: Coordinator, proposal: Proposal, question: _Question
    ) -> Plan | None:
        self.proposals.append(proposal)
        self._believed = question.estimator
        self._factors = question.snapshot.latency_factor
        if proposal.plan is not None:
            coordinator.log.add(
                coordinator.now_s(),
                "plan",
                plan=to_record(proposal.plan),
                scheduler=self._instance.planner.scheduler.type,
                gain_s=proposal.gain_s,
                remaining_s=proposal.remaining_s,
                planning_s=proposal.planning_s,
            )
        return proposal.plan

    def _question(self, coordinator: Coordinator, *, drifted_only: bool) -> _Question | None:
        """Look at the run; return what to plan, or None if all is as expected."""
        self._observer.take_steps(coordinator)
        snapshot = self._observer.snapshot(coordinator)
        left = remainder(coordinator.problem.app, snapshot)
        if left is None:
            return None
        seen = length_observations(coordinator, snapshot)
        estimator = self._instance.estimator.fit(seen) if seen else self._instance.estimator
        if drifted_only and not self._drifted(snapshot, left, estimator, seen):
            return None
        return _Question(
            snapshot,
            left,
            estimator,
            coordinator.plan,
            coordinator.rule.stage,
            dict(snapshot.running),
        )

    def _drifted(
        self,
        snapshot: Snapshot,
        left: Remainder,
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
            scenario = sample_remainder(left, known, rng, 1)[0]
            tokens.append(np.array([float(o.sum()) for o in scenario.output_tokens]))
        before, now = tokens
        return bool(np.abs(now - before).sum() > self.options.length_drift * before.sum())

    def _propose(self, question: _Question) -> Proposal:
        """Plan what is left and compare."""
        started = time.perf_counter()
        problem, planner = self._instance.problem, self._instance.planner
        rng = np.random.default_rng([planner.seed, 31])
        scenarios = sample_remainder(question.left, question.estimator, rng, self.options.scenarios)
        rest = remaining_problem(problem, question.left, scenarios, question.snapshot)
        simulator = PlanSimulator(rest)
        going_on = rest_of_plan(
            question.plan, question.stage, question.left, question.snapshot.status
        )
        remaining_s = float("inf")
        if going_on is not None:
            remaining_s = simulate_rest(simulator, going_on, question.running)
        incumbent = going_on if going_on is not None and not verify(rest, going_on) else None
        how = PlanningOptions(
            options=planner.scheduler.options,
            seed=planner.seed,
            budget_s=min(self.options.budget_s, planner.budget_s or self.options.budget_s),
            incumbent=incumbent,
        )
        made = make_plan(self._host, rest, planner.scheduler.type, how, simulator=simulator).plan
        settled = {n: (_as_held(r), s) for n, (r, s) in question.running.items()}
        best, best_s = made, float("inf")
        for candidate in (made, aligned(made, rest, settled)):
            if verify(rest, candidate):
                continue
            seconds = simulate_rest(simulator, candidate, settled)
            if seconds < best_s:
                best, best_s = candidate, seconds
        gain_s = remaining_s - best_s
        better = gain_s > self.options.min_gain * remaining_s or going_on is None
        took = time.perf_counter() - started
        return Proposal(best if better else None, gain_s, remaining_s, took)


def _as_held(running: Running) -> Running:
    """Return an engine as planned on the devices it really holds."""
    planned = Assignment(running.planned.node, running.planned.parallel, running.devices)
    return Running(planned, running.devices, 0)
