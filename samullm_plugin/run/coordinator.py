"""Carries a plan out: the same transition rule as the plan simulator's, on any executor."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from samullm_plugin.errors import PlanError, RunError
from samullm_plugin.host.interfaces.executor import (
    EngineEvent,
    Executor,
)
from samullm_plugin.model.latency import StepTable
from samullm_plugin.model.plan import Assignment, Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.types import Floats
from samullm_plugin.records import to_record
from samullm_plugin.rules.placement import one_at_a_time
from samullm_plugin.rules.preparing import wanted_ahead
from samullm_plugin.rules.sleeping import Asleep, Sleeping, can_sleep, sleeping
from samullm_plugin.rules.transition import Running, RunState, next_transition, stage_ended
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
        plan: the plan at present.
        executor: what runs engines.
        ledger: what has become of the requests.
        rule: stage and engines as the transition rule knows them.
        engines: the engines of each node.
        queue: the requests on their way.
        serving: gives them to engines.
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
        self.problem, self.plan, self.executor, self.log = problem, plan, executor, log
        resume = resume or ResumePoint(Ledger(problem.app))
        self.ledger = resume.ledger
        self.rule = RunState(stage=resume.stage, finished_before=set(resume.finished_before))
        self.drained = False
        self.queue = RequestQueue(self.ledger, source, log, resume.moved, reuse, resume.rejected)
        self._source = source
        self._replanner = replanner
        self._calibrator = calibrator
        self._app = problem.app
        self._names = [n.name for n in self._app.nodes]
        inputs = [NodeInputs(self._app, i) for i in range(len(self._names))]
        self._upstreams = {
            name: tuple(self._names[u] for u in sorted(self._app.upstreams[i]))
            for i, name in enumerate(self._names)
        }
        self._same_engine = problem.same_engine if executor.can_pass_on else {}
        self._can_sleep = executor.can_sleep and can_sleep(problem)
        self._zero_s = executor.now_s() - resume.clock_s
        self._stages = StageTracker(log, stage=resume.stage, stages_run=resume.stages_run)
        self.queue.changed = True
        self._drain_requested = False
        self._policies = [policy] * len(self._names)
        self.engines = Engines(problem, executor, inputs, log, self._policies)
        self.serving = Serving(executor, self.queue, self.engines, self._policies)
        self._loads = LoadNotes(executor, self.engines, self.serving, self.ledger, log)
        self._failures = EngineFailures(
            options or RunOptions(), self.engines, self.queue, self.serving, log, self._stop_replica
        )

    # --- what others may ask ---

    def take_steps(
        self, deployment: Deployment, replica: Replica
    ) -> tuple[StepTable, Floats] | None:
        """Return a replica's iterations since the last call; None if it does not record them."""
        taken = self.executor.take_steps(replica.key)
        if self._calibrator is not None and taken is not None and len(taken[0]):
            key = self.problem.mode_key(deployment.running.planned.parallel, replica.devices)
            self._calibrator.add_steps(deployment.node, key, *taken)
        return taken

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
            self._transition()  # engines start while the rest is prepared
            if self._replanner is not None:
                self._replanner.begin(self)
        wait_s = float("inf") if self.executor.virtual_clock else WAIT_S
        while not self.ledger.all_settled:
            stage_changed = self.queue.changed and self._transition()
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
        for node in list(self.engines.deployments):
            self._stop(node)
        self.engines.prepare((), self.now_s())
        self.engines.end_sleep(list(self.engines.asleep))
        self._stages.end(self.now_s(), self._finished())
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
        end = self.plan.stages[self.rule.stage].end
        if end.kind == "node_progress":
            self._update_rule()
            if stage_ended(self.plan.stages[self.rule.stage], self.rule):
                self.queue.changed = True

    # --- engines and stages ---

    def _finished(self) -> set[str]:
        return {n for i, n in enumerate(self._names) if self.ledger.settled(i)}

    def _update_rule(self) -> None:
        self.rule.finished = self._finished()
        engines = {self._names[i]: d.running for i, d in self.engines.deployments.items()}
        self.rule.running = {n: r for n, r in engines.items() if n not in self.rule.finished}
        self.rule.released = {n: r for n, r in engines.items() if n in self.rule.finished}
        watched = {s.end.node for s in self.plan.stages if s.end.kind == "node_progress"}
        self.rule.done_fraction = {
            name: self.ledger.num_settled(i) / len(self.ledger.status[i])
            for i, name in enumerate(self._names)
            if name in watched
        }

    def _transition(self) -> bool:
        """Stop and start engines; return whether another stage is current now."""
        self.queue.changed = False
        before, stalled = self.rule.stage, False
        while True:
            for node in [i for i in self.engines.deployments if self.ledger.settled(i)]:
                if not self._can_be_taken_over(node):
                    self._stop(node)
            self._update_rule()
            if len(self.rule.finished) == len(self._names):
                self._stop_released(())
                break  # what is left is for Python nodes
            stuck = stalled and self.rule.stage == len(self.plan.stages) - 1
            move = next_transition(
                self.plan,
                self.problem.cluster,
                self._upstreams,
                self.rule,
                stalled=stalled,
                same_engine=self._same_engine,
            )
            self._stages.enter(self.plan, move.stage, self.now_s(), self._finished())
            change = Sleeping()
            if self._can_sleep:
                asleep = self.engines.asleep
                change = sleeping(self.problem, self.plan, self.rule, move, asleep)
            self.engines.end_sleep(change.end)
            for name, kind in change.begin.items():
                self._put_to_sleep(name, kind)
            self._stop_released({*change.begin, *(r.takes_over for r in move.start)})
            kept: set[int] = set()
            for name in move.stop:
                node = self._app.index(name)
                if self.engines.barred(node):
                    kept |= set(self.engines.deployments[node].running.devices)
                else:
                    self._stop(node)
            for running in move.start:
                if running.takes_over is not None:
                    self._take_over(running)
                elif not kept & set(running.devices):
                    wakes = change.wake.get(running.planned.node)
                    self.engines.start(running, self.now_s(), wakes)
            stalled = not self._can_go_on()
            if not stalled:
                break
            if stuck:
                raise RunError(
                    "the plan cannot finish: after its last stage these nodes wait for ever: "
                    + ", ".join(sorted(set(self._names) - self._finished()))
                )
        if not self.ledger.all_settled:
            self._prepare()
        self._prefetch()
        return self.rule.stage != before

    def _can_be_taken_over(self, node: int) -> bool:
        """Return whether a node's engines can go on for another: all are ready, and idle."""
        deployment = self.engines.deployments[node]
        return self._names[node] in self._same_engine and all(
            r.ready_s is not None and not r.outstanding and not r.backlog
            for r in deployment.replicas
        )

    def _stop_released(self, kept: Iterable[str | None]) -> None:
        """Stop the engines of nodes that have finished, but for those that are kept."""
        for name in set(self.rule.released) - set(kept):
            self._stop(self._app.index(name))

    def _put_to_sleep(self, name: str, asleep: Asleep) -> None:
        """Let the engines of a node that has finished sleep; stop them where that is refused."""
        node = self._app.index(name)
        deployment = self.engines.deployments[node]
        if self._calibrator is not None:
            for replica in deployment.replicas:
                self.take_steps(deployment, replica)
        if not self.engines.put_to_sleep(deployment, asleep, self.now_s()):
            self._stop(node)

    def _take_over(self, running: Running) -> None:
        """Let engines go on for another node."""
        if self._calibrator is not None:
            before = self.engines.deployments[self._app.index(str(running.takes_over))]
            for replica in before.replicas:
                self.take_steps(before, replica)
        self.engines.take_over(running, self.now_s())

    def _prepare(self) -> None:
        """Have the engines that come next prepared, if the executor can."""
        if self.executor.can_prepare:
            self._update_rule()
            asleep = self.engines.asleep
            wanted = wanted_ahead(self.problem, self.plan, self.rule, asleep)
            self.engines.prepare(wanted, self.now_s())

    def _prefetch(self) -> None:
        """Have the weights of the next stage's models read ahead, once on each machine."""
        caches, stage = self.engines.caches, self.rule.stage
        for name, devices in caches.read_next(self.plan, stage, self._finished(), self.now_s()):
            self.executor.prefetch_on(self.problem.node(name).model, devices)

    def _can_go_on(self) -> bool:
        """Return whether a node or the current stage can end if nothing else is started."""
        if self.serving.late:
            return True
        running = set(self.engines.deployments)
        untaken = [self._source.untaken(i) for i in range(len(self._app.all_nodes))]
        foreseen = self.ledger.foreseen(running, untaken)
        mine = range(len(self._names))
        if any(foreseen[i].all() and not self.ledger.settled(i) for i in mine):
            return True
        end = self.plan.stages[self.rule.stage].end
        if end.kind != "node_progress" or end.node is None:
            return False
        will = foreseen[self._app.index(end.node)]
        rank = min(len(will), max(1, int(np.ceil(end.fraction * len(will) - 1e-9))))
        done = self.ledger.num_settled(self._app.index(end.node))
        return done < rank <= int(will.sum())

    def _stop_replica(self, deployment: Deployment, replica: Replica) -> None:
        """Stop an engine, its iterations taken before; what it had not finished is queued again."""
        if self._calibrator is not None and replica.ready_s is not None:
            self.take_steps(deployment, replica)
        outputs = self.executor.stop_engine(replica.key)
        self.serving.take_back(deployment.node, replica, outputs, self.now_s())

    def _stop(self, node: int) -> None:
        deployment = self.engines.deployments[node]
        for replica in list(deployment.replicas):
            self._stop_replica(deployment, replica)
        self.engines.note_stopped(deployment, self.now_s(), finished=self.ledger.settled(node))

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
                self._stop_replica(deployment, replica)
            if gone:
                self.engines.drop(deployment, gone, self.now_s())
        self._update_rule()
        plan = self._replanner.replacement(self) if self._replanner is not None else None
        if plan is None:
            left = set(range(self.problem.cluster.num_gpus)) - lost
            unfinished = [i for i in self._app.order if not self.ledger.settled(i)]
            try:
                plan = one_at_a_time(self.problem, unfinished, left)
            except PlanError as error:
                raise RunError(
                    f"the run cannot go on: devices {sorted(lost)} are lost ({event.reason}); "
                    f"{error}; resume it when they are back"
                ) from error
            self.log.add(self.now_s(), "plan", plan=to_record(plan), scheduler="one at a time")
        if plan.stages:
            self.adopt(plan)

    def _replan(self, *, stage_changed: bool) -> None:
        if self._replanner is None:
            return
        plan = self._replanner.consider(self, stage_changed=stage_changed)
        if plan is not None:
            self.adopt(plan)

    def adopt(self, plan: Plan) -> None:
        """Go on with another plan from now on; engines it assigns equally stay untouched."""
        self._stages.begin_plan(self.now_s(), self._finished())
        self.plan = plan
        for deployment in self.engines.deployments.values():
            old = deployment.running
            planned = Assignment(old.planned.node, old.planned.parallel, old.devices)
            deployment.running = Running(planned, old.devices, 0)
        self.rule = RunState(barred=set(self.engines.lost))
        self._transition()

    def _drain(self) -> None:
        """Stop every engine, keeping what was generated."""
        for node in list(self.engines.deployments):
            self._stop(node)
        self.engines.prepare((), self.now_s())
        self.engines.end_sleep(list(self.engines.asleep))
        while self.serving.late and (events := self.executor.poll(1.0)):
            self._take(events)
        self.drained = True
        self.log.add(self.now_s(), "drained")
        self.log.flush()
