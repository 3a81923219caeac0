"""Carries a plan out: the same transition rule as the plan simulator's, on any executor."""

from __future__ import annotations

from collections.abc import Iterable

from samullm_plugin.errors import PlanError, RunError
from samullm_plugin.host.interfaces.executor import (
    EngineEvent,
    Executor,
)
from samullm_plugin.model.latency import StepTable
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.types import Floats
from samullm_plugin.records import to_record
from samullm_plugin.rules.placement import one_at_a_time
from samullm_plugin.rules.transition import RunState
from samullm_plugin.run.calibrating import Calibrator
from samullm_plugin.run.dispatch import Deployment, Replica
from samullm_plugin.run.engine_failures import EngineFailures, RunOptions
from samullm_plugin.run.engines import Engines
from samullm_plugin.run.ledger import Ledger
from samullm_plugin.run.loads import LoadNotes
from samullm_plugin.run.log import RunLog, StageTracker
from samullm_plugin.run.prompts import PromptBuilder
from samullm_plugin.run.recovery import ResumePoint
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.run.reuse import Reuse
from samullm_plugin.run.serving import Serving
from samullm_plugin.run.transitions import Transitions
from samullm_plugin.run.view import Replanning
from samullm_plugin.simulator.requests import NodeInputs
from samullm_plugin.simulator.runs import PolicyCall

WAIT_S = 0.1
"""Longest wait for events on a real clock, so that an interruption is noticed."""

CALL_WAIT_S = 0.01
"""The same while Python functions are being called."""


class Coordinator:
    """Drives an executor until every request is settled.

    Attributes:
        problem: application, cluster and what the plan assumes.
        executor: what runs engines.
        ledger: what has become of the requests.
        engines: the engines of each node.
        queue: the requests on their way.
        serving: gives them to engines.
        transitions: starts and stops engines as the plan says.
        log: the events.
        drained: the run was interrupted and can be resumed.
        stopped: why it stopped by itself, drained; None if it did not.
    """

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        executor: Executor,
        source: PromptBuilder,
        log: RunLog,
        *,
        resume: ResumePoint | None = None,
        replanner: Replanning | None = None,
        options: RunOptions | None = None,
        policy: PolicyCall | None = None,
        reuse: Reuse | None = None,
        calibrator: Calibrator | None = None,
    ) -> None:
        """Prepare a run; nothing is started.

        Args:
            problem: the instance.
            plan: a valid plan of it.
            executor: open.
            source: makes prompts.
            log: where events are recorded.
            resume: where to take up; None: at the beginning.
            replanner: may replace the plan; None: it is kept.
            options: limits.
            reuse: outputs of earlier runs; None: everything is asked.
            policy: order and replicas of requests; None: first come, first served, in turn.
            calibrator: gathers what engines measure; None: nobody does.
        """
        self.problem, self.executor, self.log = problem, executor, log
        resume = resume or ResumePoint(Ledger(problem.app))
        self.ledger = resume.ledger
        self.drained = False
        self.queue = RequestQueue(self.ledger, source, log, resume.moved, reuse, resume.rejected)
        self._replanner = replanner
        self._calibrator = calibrator
        self._names = [n.name for n in problem.app.nodes]
        inputs = [NodeInputs(problem.app, i) for i in range(len(self._names))]
        self._zero_s = executor.now_s() - resume.clock_s
        self._stages = StageTracker(log, stage=resume.stage, stages_run=resume.stages_run)
        self.queue.changed = True
        self._drain_requested = False
        self._policies = [policy] * len(self._names)
        self.engines = Engines(problem, executor, inputs, log, self._policies)
        self.serving = Serving(executor, self.queue, self.engines, self._policies)
        self.transitions = Transitions(
            problem,
            plan,
            executor,
            self.engines,
            self.queue,
            self.serving,
            source,
            resume,
            self._stages,
            self.now_s,
            self._take_last_steps,
        )
        self._loads = LoadNotes(executor, self.engines, self.serving, self.ledger, log)
        self._failures = EngineFailures(
            options or RunOptions(),
            self.engines,
            self.queue,
            self.serving,
            log,
            self.transitions.stop_replica,
        )

    # --- what others may ask ---

    @property
    def plan(self) -> Plan:
        """Return the plan at present."""
        return self.transitions.plan

    @property
    def rule(self) -> RunState:
        """Return stage and engines as the transition rule knows them."""
        return self.transitions.rule

    def take_steps(
        self, deployment: Deployment, replica: Replica
    ) -> tuple[StepTable, Floats] | None:
        """Return a replica's iterations since the last call; None if it does not record them."""
        taken = self.executor.take_steps(replica.key)
        if self._calibrator is not None and taken is not None and len(taken[0]):
            key = self.problem.mode_key(deployment.running.planned.parallel, replica.devices)
            self._calibrator.add_steps(deployment.node, key, *taken)
        return taken

    def _take_last_steps(self, deployment: Deployment, replica: Replica) -> None:
        """Take the iterations of an engine that leaves its node, if somebody gathers them."""
        if self._calibrator is not None and replica.ready_s is not None:
            self.take_steps(deployment, replica)

    def now_s(self) -> float:
        """Return the run's clock."""
        return self.executor.now_s() - self._zero_s

    @property
    def stopped(self) -> str | None:
        """Return why the run stops so that it can be resumed; None: it goes on."""
        return self._failures.hopeless

    def choose_policy(self, policy: PolicyCall | None) -> None:
        """Let another request policy decide for nodes that have no engines, prepared ones included.

        Engines that there are keep the order and the replicas that they were started with.
        """
        for i, name in enumerate(self._names):
            if i not in self.engines.deployments and name not in self.engines.prepared:
                self._policies[i] = policy

    def request_drain(self) -> None:
        """Stop at the next opportunity, keeping what was generated."""
        self._drain_requested = True

    # --- the loop ---

    def run(self) -> None:
        """Run until every request is settled, or until drained.

        Raises:
            RunError: if the run cannot go on.
        """
        try:
            self._run()
        finally:
            self.queue.calls.close()
            if self._replanner is not None:
                self._replanner.end()

    def _run(self) -> None:
        self.queue.admit_first(self.now_s())
        if not self.ledger.all_settled:
            self.transitions.apply()  # engines start while the rest is prepared
            if self._replanner is not None:
                self._replanner.begin(self)
        wait_s = float("inf") if self.executor.virtual_clock else WAIT_S
        while not self.ledger.all_settled:
            stage_changed = self.queue.changed and self.transitions.apply()
            if not self.ledger.all_settled:
                self._replan(stage_changed=stage_changed)
            self.log.flush()
            if self._drain_requested:
                self._drain()
                return
            if self.ledger.all_settled:
                break
            self.serving.dispatch(self.now_s())
            self._loads.note(self.now_s())
            events = self.executor.poll(self._wait_s(wait_s))
            if not events and self.executor.virtual_clock and not self.queue.calls.busy:
                raise RunError("the run cannot go on: nothing runs, and requests are left")
            self._take(events)
        self.transitions.stop_all()
        self._stages.end(self.now_s(), self.transitions.finished())
        self.log.flush()

    def _wait_s(self, longest_s: float) -> float:
        """Return how long to wait for the engines: not beyond the end of a call."""
        calls = self.queue.calls
        if not calls.busy:
            return longest_s
        if not self.executor.virtual_clock:
            longest_s = min(longest_s, CALL_WAIT_S)
        return max(0.0, min(longest_s, calls.next_s() - self.now_s()))

    def _take(self, events: Iterable[EngineEvent]) -> None:
        for event in events:
            time_s = event.time_s - self._zero_s
            if event.kind in ("lost", "joined"):
                self._change_devices(event, time_s)
                continue
            if event.kind == "finished":
                self.serving.take_outputs(event, time_s)
                continue
            found = self.engines.find(event.key)
            if found is None:  # it was stopped in the meantime, or has not been started
                if event.kind == "failed":
                    self.engines.note_unprepared(event.key, time_s, event.reason)
                continue
            deployment, replica = found
            if event.kind == "ready":
                self.engines.note_ready(deployment, replica, time_s)
                if self._calibrator is not None and not replica.prepared:  # a whole start
                    key = self.problem.mode_key(
                        deployment.running.planned.parallel, replica.devices
                    )
                    self._calibrator.add_start(deployment.node, key, time_s - replica.started_s)
            else:
                self._failures.replace(deployment, replica, event.reason, time_s)
                if self.stopped is not None:
                    self.request_drain()
        self.queue.end_calls(self.now_s())
        self.transitions.note_progress()

    # --- other devices, other plans ---

    def _change_devices(self, event: EngineEvent, time_s: float) -> None:
        """Go on without devices that are lost, or with some that have come back.

        Requests of lost engines continue elsewhere from the tokens heard of. Lost devices do not
        count as failures of the nodes that were on them.

        Raises:
            RunError: if a node that is not finished fits on none of the devices that are left; the
                run can be resumed.
        """
        lost = self.engines.lost
        changed = set(event.devices) - lost if event.kind == "lost" else set(event.devices) & lost
        if not changed:
            return
        self.log.add(time_s, f"devices_{event.kind}", devices=sorted(changed), reason=event.reason)
        if event.kind == "joined":
            lost -= changed
            self.rule.barred = set(lost)
            if self._replanner is not None:
                self._replanner.devices_joined()
            self.queue.changed = True
            return
        lost |= changed
        for machine, devices in enumerate(self.problem.cluster.machines):
            if lost.issuperset(devices):  # what joins for it may be another
                self.engines.caches.forget(machine)
        self.engines.prepare((), self.now_s())  # it may have been for a machine that is lost
        self.rule.barred = set(lost)
        stages = self.plan.stages[max(self.rule.stage, 0) :]
        needed = {d for s in stages for a in s.assignments for d in a.devices}
        held = {d for e in self.engines.deployments.values() for d in e.running.devices}
        if lost.isdisjoint(needed | held):
            return
        for deployment in list(self.engines.deployments.values()):
            gone = [r for r in deployment.replicas if not lost.isdisjoint(r.devices)]
            for replica in gone:
                self.transitions.stop_replica(deployment, replica)
            if gone:
                self.engines.drop(deployment, gone, self.now_s())
        self.transitions.update()
        plan = self._replanner.replacement(self) if self._replanner is not None else None
        if plan is None:
            left = set(range(self.problem.cluster.num_gpus)) - lost
            unfinished = [i for i in self.problem.app.order if not self.ledger.settled(i)]
            try:
                plan = one_at_a_time(self.problem, unfinished, left)
            except PlanError as error:
                raise RunError(
                    f"the run cannot go on: devices {sorted(lost)} are lost ({event.reason}); "
                    f"{error}; resume it when they are back"
                ) from error
            self.log.add(self.now_s(), "plan", plan=to_record(plan), scheduler="one at a time")
        if plan.stages:
            self.transitions.adopt(plan)

    def _replan(self, *, stage_changed: bool) -> None:
        if self._replanner is None:
            return
        plan = self._replanner.consider(self, stage_changed=stage_changed)
        if plan is not None:
            self.transitions.adopt(plan)

    def _drain(self) -> None:
        """Stop every engine, keeping what was generated."""
        self.transitions.stop_all()
        while self.serving.late and (events := self.executor.poll(1.0)):
            self._take(events)
        self.drained = True
        self.log.add(self.now_s(), "drained")
        self.log.flush()
