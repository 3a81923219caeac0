"""What becomes of engines that fail: started anew, given up, or a reason to stop the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from samullm_plugin.run.dispatch import Deployment, Replica
from samullm_plugin.run.engines import Engines
from samullm_plugin.run.ledger import Status
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.run.results import RequestId
from samullm_plugin.run.serving import Serving


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Limits of a run.

    Attributes:
        max_engine_failures: after so many failures of a node's engines at work, none of its
            requests having finished in between, the node is given up; after so many in a row that
            did not start, the run stops.
        max_request_failures: a request is given up after so many engines died under it.
    """

    max_engine_failures: int = 3
    max_request_failures: int = 3


class EngineFailures:
    """Replaces engines that fail, as long as that helps.

    Attributes:
        hopeless: why the run is to stop so that it can be resumed; None: it goes on.
    """

    def __init__(
        self,
        options: RunOptions,
        engines: Engines,
        queue: RequestQueue,
        serving: Serving,
        log: RunLog,
        stop: Callable[[Deployment, Replica], None],
    ) -> None:
        """Begin with no failure.

        Args:
            options: limits.
            engines: all of the run.
            queue: takes back what they had.
            serving: counts failures since a request of a node has finished.
            log: records the failures.
            stop: stops an engine, keeping what its requests have generated.
        """
        self.hopeless: str | None = None
        self._options, self._engines, self._queue = options, engines, queue
        self._serving, self._log, self._stop = serving, log, stop
        self._deaths: dict[RequestId, int] = {}

    def replace(self, deployment: Deployment, replica: Replica, reason: str, time_s: float) -> None:
        """Start an engine anew that has failed, elsewhere if possible; or give its node up."""
        node, name = deployment.node, deployment.running.planned.node
        held = list(replica.outstanding) if replica.ready_s is not None else []
        self._stop(deployment, replica)
        status = self._queue.ledger.status[node]
        victims = [r for r in held if status[r] == Status.READY]
        started = replica.ready_s is not None
        if started:
            self._serving.failures[node] += 1
            self._serving.unstarted[node] = 0
        else:
            self._serving.unstarted[node] += 1
        failures = (self._serving.failures if started else self._serving.unstarted)[node]
        self._log.add(
            time_s, "engine_failed", key=replica.key, node=name, reason=reason, failures=failures
        )
        if failures >= self._options.max_engine_failures:
            if not started:  # what has never worked may be repaired
                self.hopeless = (
                    f"engines of {name} do not start ({failures} in a row); the last: {reason}"
                )
                self._engines.forget(deployment, replica, time_s, finished=False)
                return
            self._give_up(
                deployment,
                replica,
                f"{failures} engines of {name} failed, none of its requests having finished in "
                f"between; the last: {reason}",
                time_s,
            )
            return
        for r in victims:
            deaths = self._deaths[node, r] = self._deaths.get((node, r), 0) + 1
            if deaths >= self._options.max_request_failures:
                self._queue.unqueue(node, r)
                why = f"{deaths} engines died under it; the last: {reason}"
                self._queue.fail((node, r), why, time_s)
        self._engines.restart(deployment, replica, time_s)

    def _give_up(self, deployment: Deployment, failed: Replica, reason: str, now_s: float) -> None:
        """Fail every request of a node that is not settled, and stop its engines."""
        for replica in deployment.replicas:
            if replica is not failed:
                self._stop(deployment, replica)
        self._engines.note_stopped(deployment, now_s, finished=False)
        self._queue.fail_node(deployment.node, reason, now_s)
