"""Which engines a run has: the transition rule applied to the plan, and carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from samullm_plugin.errors import RunError
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.model.plan import Assignment, Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.preparing import wanted_ahead
from samullm_plugin.rules.sleeping import Asleep, Sleeping, can_sleep, sleeping
from samullm_plugin.rules.transition import Running, RunState, next_transition, stage_ended
from samullm_plugin.run.dispatch import Deployment, Replica
from samullm_plugin.run.engines import Engines
from samullm_plugin.run.log import StageTracker
from samullm_plugin.run.prompts import PromptBuilder
from samullm_plugin.run.recovery import ResumePoint
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.run.serving import Serving


class Transitions:
    """Starts and stops engines as the plan and the transition rule say.

    Attributes:
        plan: the plan at present.
        rule: stage and engines as the transition rule knows them.
    """

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        executor: Executor,
        engines: Engines,
        queue: RequestQueue,
        serving: Serving,
        source: PromptBuilder,
        resume: ResumePoint,
        stages: StageTracker,
        now_s: Callable[[], float],
        before_leaving: Callable[[Deployment, Replica], None],
    ) -> None:
        """Begin before the first stage, or where a run is taken up; nothing is started.

        Args:
            problem: the instance.
            plan: a valid plan of it.
            executor: whose engines they are.
            engines: of the run.
            queue: of its requests.
            serving: gives them to engines.
            source: knows which requests nothing will be asked of.
            resume: where to begin.
            stages: logs stages.
            now_s: the run's clock.
            before_leaving: is called before an engine stops, sleeps, or goes on for another node.
        """
        self.plan = plan
        self.rule = RunState(stage=resume.stage, finished_before=set(resume.finished_before))
        self._problem, self._executor, self._engines = problem, executor, engines
        self._queue, self._ledger, self._serving = queue, queue.ledger, serving
        self._source, self._stages, self._now_s = source, stages, now_s
        self._before_leaving = before_leaving
        self._app = problem.app
        self._names = [n.name for n in self._app.nodes]
        self._upstreams = {
            name: tuple(self._names[u] for u in sorted(self._app.upstreams[i]))
            for i, name in enumerate(self._names)
        }
        self._same_engine = problem.same_engine if executor.can_pass_on else {}
        self._can_sleep = executor.can_sleep and can_sleep(problem)

    def finished(self) -> set[str]:
        """Return the nodes that have finished."""
        return {n for i, n in enumerate(self._names) if self._ledger.settled(i)}

    def update(self) -> None:
        """Bring what the rule knows up to date."""
        self.rule.finished = self.finished()
        engines = {self._names[i]: d.running for i, d in self._engines.deployments.items()}
        self.rule.running = {n: r for n, r in engines.items() if n not in self.rule.finished}
        self.rule.released = {n: r for n, r in engines.items() if n in self.rule.finished}
        watched = {s.end.node for s in self.plan.stages if s.end.kind == "node_progress"}
        self.rule.done_fraction = {
            name: self._ledger.num_settled(i) / len(self._ledger.status[i])
            for i, name in enumerate(self._names)
            if name in watched
        }

    def note_progress(self) -> None:
        """Have the rule applied again if the current stage has ended at a share of a node."""
        stage = self.plan.stages[self.rule.stage]
        if stage.end.kind == "node_progress":
            self.update()
            if stage_ended(stage, self.rule):
                self._queue.changed = True

    def apply(self) -> bool:
        """Stop and start engines; return whether another stage is current now.

        Raises:
            RunError: if the plan cannot finish.
        """
        self._queue.changed = False
        before, stalled = self.rule.stage, False
        while True:
            for node in [i for i in self._engines.deployments if self._ledger.settled(i)]:
                if not self._can_be_taken_over(node):
                    self.stop(node)
            self.update()
            if len(self.rule.finished) == len(self._names):
                self._stop_released(())
                break  # what is left is for Python nodes
            stuck = stalled and self.rule.stage == len(self.plan.stages) - 1
            move = next_transition(
                self.plan,
                self._problem.cluster,
                self._upstreams,
                self.rule,
                stalled=stalled,
                same_engine=self._same_engine,
            )
            self._stages.enter(self.plan, move.stage, self._now_s(), self.finished())
            change = Sleeping()
            if self._can_sleep:
                asleep = self._engines.asleep
                change = sleeping(self._problem, self.plan, self.rule, move, asleep)
            self._engines.end_sleep(change.end)
            for name, kind in change.begin.items():
                self._put_to_sleep(name, kind)
            self._stop_released({*change.begin, *(r.takes_over for r in move.start)})
            kept: set[int] = set()
            for name in move.stop:
                node = self._app.index(name)
                if self._engines.barred(node):
                    kept |= set(self._engines.deployments[node].running.devices)
                else:
                    self.stop(node)
            for running in move.start:
                if running.takes_over is not None:
                    self._take_over(running)
                elif not kept & set(running.devices):
                    wakes = change.wake.get(running.planned.node)
                    self._engines.start(running, self._now_s(), wakes)
            stalled = not self._can_go_on()
            if not stalled:
                break
            if stuck:
                raise RunError(
                    "the plan cannot finish: after its last stage these nodes wait for ever: "
                    + ", ".join(sorted(set(self._names) - self.finished()))
                )
        if not self._ledger.all_settled:
            self._prepare()
        self._prefetch()
        return self.rule.stage != before

    def _can_be_taken_over(self, node: int) -> bool:
        """Return whether a node's engines can go on for another: all are ready, and idle."""
        deployment = self._engines.deployments[node]
        return self._names[node] in self._same_engine and all(
            r.ready_s is not None and not r.outstanding and not r.backlog
            for r in deployment.replicas
        )

    def _stop_released(self, kept: Iterable[str | None]) -> None:
        """Stop the engines of nodes that have finished, but for those that are kept."""
        for name in set(self.rule.released) - set(kept):
            self.stop(self._app.index(name))

    def _put_to_sleep(self, name: str, asleep: Asleep) -> None:
        """Let the engines of a node that has finished sleep; stop them where that is refused."""
        node = self._app.index(name)
        deployment = self._engines.deployments[node]
        for replica in deployment.replicas:
            self._before_leaving(deployment, replica)
        if not self._engines.put_to_sleep(deployment, asleep, self._now_s()):
            self.stop(node)

    def _take_over(self, running: Running) -> None:
        """Let engines go on for another node."""
        before = self._engines.deployments[self._app.index(str(running.takes_over))]
        for replica in before.replicas:
            self._before_leaving(before, replica)
        self._engines.take_over(running, self._now_s())

    def _prepare(self) -> None:
        """Have the engines that come next prepared, if the executor can."""
        if self._executor.can_prepare:
            self.update()
            asleep = self._engines.asleep
            wanted = wanted_ahead(self._problem, self.plan, self.rule, asleep)
            self._engines.prepare(wanted, self._now_s())

    def _prefetch(self) -> None:
        """Have the weights of the next stage's models read ahead, once on each machine."""
        caches, stage = self._engines.caches, self.rule.stage
        for name, devices in caches.read_next(self.plan, stage, self.finished(), self._now_s()):
            self._executor.prefetch_on(self._problem.node(name).model, devices)

    def _can_go_on(self) -> bool:
        """Return whether a node or the current stage can end if nothing else is started."""
        if self._serving.late:
            return True
        running = set(self._engines.deployments)
        untaken = [self._source.untaken(i) for i in range(len(self._app.all_nodes))]
        foreseen = self._ledger.foreseen(running, untaken)
        mine = range(len(self._names))
        if any(foreseen[i].all() and not self._ledger.settled(i) for i in mine):
            return True
        end = self.plan.stages[self.rule.stage].end
        if end.kind != "node_progress" or end.node is None:
            return False
        will = foreseen[self._app.index(end.node)]
        rank = min(len(will), max(1, int(np.ceil(end.fraction * len(will) - 1e-9))))
        done = self._ledger.num_settled(self._app.index(end.node))
        return done < rank <= int(will.sum())

    def stop_replica(self, deployment: Deployment, replica: Replica) -> None:
        """Stop an engine; what it had not finished is queued again."""
        self._before_leaving(deployment, replica)
        outputs = self._executor.stop_engine(replica.key)
        self._serving.take_back(deployment.node, replica, outputs, self._now_s())

    def stop(self, node: int) -> None:
        """Stop the engines of a node."""
        deployment = self._engines.deployments[node]
        for replica in list(deployment.replicas):
            self.stop_replica(deployment, replica)
        self._engines.note_stopped(deployment, self._now_s(), finished=self._ledger.settled(node))

    def stop_all(self) -> None:
        """Stop every engine, those that sleep or are prepared as well."""
        for node in list(self._engines.deployments):
            self.stop(node)
        self._engines.prepare((), self._now_s())
        self._engines.end_sleep(list(self._engines.asleep))

    def adopt(self, plan: Plan) -> None:
        """Go on with another plan from now on; engines it assigns equally stay untouched."""
        self._stages.begin_plan(self._now_s(), self.finished())
        self.plan = plan
        for deployment in self._engines.deployments.values():
            old = deployment.running
            planned = Assignment(old.planned.node, old.planned.parallel, old.devices)
            deployment.running = Running(planned, old.devices, 0)
        self.rule = RunState(barred=set(self._engines.lost))
        self.apply()
