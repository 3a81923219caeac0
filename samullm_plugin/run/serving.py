"""Gives requests to engines, as many at a time as they can soon use, and takes their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from samullm_plugin.errors import RunError
from samullm_plugin.host.interfaces.executor import EngineEvent, Executor, RequestOutput
from samullm_plugin.run.dispatch import Deployment, Replica
from samullm_plugin.run.engines import Engines
from samullm_plugin.run.ledger import Status
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.simulator.node_run import UNFORESEEN_S
from samullm_plugin.simulator.runs import PolicyCall


class Serving:
    """The requests between the queue and the engines.

    Attributes:
        late: by engines that were stopped, the node and the requests that are still to be reported
            as finished.
        failures: per node, failures of engines at work since one of its requests has finished.
        unstarted: per node, engines that did not start, one after another.
    """

    def __init__(
        self,
        executor: Executor,
        queue: RequestQueue,
        engines: Engines,
        policies: Sequence[PolicyCall | None],
    ) -> None:
        """Begin with no request given.

        Args:
            executor: takes requests.
            queue: those that can be served.
            engines: that serve them.
            policies: by node, order and replicas of requests; None: first come, first served, in
                turn. It may change for nodes that have no engines.
        """
        self.late: dict[str, tuple[int, set[int]]] = {}
        self.failures = [0] * len(queue.ledger.app.nodes)
        self.unstarted = [0] * len(queue.ledger.app.nodes)
        self._executor, self._queue, self._engines = executor, queue, engines
        self._policies = policies

    def dispatch(self, now_s: float) -> None:
        """Deal what can be served to engines, and give them what they have room for."""
        for node, deployment in list(self._engines.deployments.items()):
            if not deployment.ready:
                continue
            if self._queue.queued(node):
                self._deal(node, deployment)
            for replica in deployment.replicas:
                # without a policy no request comes before another that the engine has
                if replica.backlog and (replica.room or self._policies[node] is not None):
                    self._give(node, replica, now_s)

    def _deal(self, node: int, deployment: Deployment) -> None:
        policy = self._policies[node]
        if policy is not None and deployment.assigned is None:
            deployment.assigned = self._assign(node, deployment, policy)
        deployment.deal(self._queue.take_queue(node))

    def _give(self, node: int, replica: Replica, now_s: float) -> None:
        """Give an engine requests up to its window, and any that are to be served before others."""
        requests = []
        for priority, r in replica.take_backlog():
            if (given := self._queue.given(node, r, now_s, priority)) is not None:
                replica.outstanding[r] = given
                requests.append(given)
        if requests:
            if replica.busy_since_s is None:
                replica.busy_since_s = now_s
            self._executor.submit(replica.key, requests)

    def _assign(
        self, node: int, deployment: Deployment, policy: PolicyCall
    ) -> dict[int, tuple[int, int | None]]:
        """Ask the request policy about everything that is left of a node."""
        status = self._queue.ledger.status[node]
        left = np.flatnonzero(status < Status.FINISHED)
        there_s = deployment.inputs.available_s(self._queue.ledger.finish_s)
        unforeseen = np.zeros(len(left), bool) if there_s is None else np.isinf(there_s[left])
        arrival_s = np.where(unforeseen, UNFORESEEN_S, 0.0)
        priority, place = policy(0, node, left, arrival_s, len(deployment.replicas))
        if priority is None:
            priority = np.zeros(len(left), np.int64)
        places: list[int | None] = [None] * len(left)  # in turn
        if place is not None:
            places = deployment.inputs.with_chains_whole(left, place).tolist()
        pairs = zip(priority.tolist(), places, strict=True)
        return dict(zip(left.tolist(), pairs, strict=True))

    def take_outputs(self, event: EngineEvent, time_s: float) -> None:
        """Settle what an engine has finished, which may have been stopped meanwhile.

        Raises:
            RunError: if it reports requests that it does not have.
        """
        found = self._engines.find(event.key)
        for output in event.outputs:
            if found is not None:
                deployment, replica = found
                node = deployment.node
                replica.outstanding.pop(output.request, None)
                replica.num_finished += 1
                if not replica.outstanding:
                    replica.note_busy(time_s)
            elif event.key in self.late:
                node, waiting = self.late[event.key]
                waiting.discard(output.request)
                if not waiting:
                    del self.late[event.key]
            else:
                known = self._engines.node_of(event.key)
                status = None if known is None else self._queue.ledger.status[known]
                if status is None or status[output.request] < Status.FINISHED:
                    raise RunError(f"engine {event.key} reported a request it does not have")
                continue
            self.failures[node] = self.unstarted[node] = 0
            self._queue.finish((node, output.request), output, time_s)

    def take_back(
        self, node: int, replica: Replica, outputs: Iterable[RequestOutput], now_s: float
    ) -> None:
        """Keep what a stopped engine had generated; what it had not been given is queued again."""
        replica.note_busy(now_s)
        for output in outputs:
            given = replica.outstanding.pop(output.request, None)
            if given is not None:
                self._queue.take_back(node, given, output, now_s)
        if replica.outstanding:  # the executor will report that these have finished
            self.late[replica.key] = (node, set(replica.outstanding))
        self._queue.put_back(node, replica.backlog.clear())

    def waiting(self) -> int:
        """Return how many requests could be served but are at no engine."""
        queued = sum(len(self._queue.queued(i)) for i in range(len(self.failures)))
        dealt = sum(len(r.backlog) for d in self._engines.deployments.values() for r in d.replicas)
        return queued + dealt
