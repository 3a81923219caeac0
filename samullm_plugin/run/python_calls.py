"""Calls of users' functions during a run: in worker processes, or imitated."""

from __future__ import annotations

import heapq
import queue
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from samullm_plugin.app.calling import Returned, call_function
from samullm_plugin.app.functions import Function, Row, Scope, describe_function
from samullm_plugin.host.isolation import IsolatedWorker
from samullm_plugin.run.results import RequestId

MOST_ROWS = 64
"""Rows that a worker is given at once."""

_IMPORT_S = 60.0
"""Seconds that importing a function may take before its first call."""
GRACE_S = 5.0
"""Seconds beyond the limits of its rows after which a worker is killed; it may have to import."""


@dataclass(frozen=True, slots=True)
class Call:
    """A function to be called for a request.

    Attributes:
        function: the function; None in imitations.
        rows: one; with scope ``all``, every row.
        scope: what the function is given.
        limit_s: seconds it may take.
        most: rows that one may become.
        batch_size: rows per call, with scope ``batch``.
        workers: processes that call it side by side.
        seconds: how long it takes, in imitations.
        value: what it returns, in imitations.
    """

    function: Function | None = None
    rows: tuple[Row, ...] = ()
    scope: Scope = "row"
    limit_s: float = 60.0
    most: int | None = None
    batch_size: int = 32
    workers: int = 1
    seconds: float = 0.0
    value: Any = None


@dataclass(frozen=True, slots=True)
class CallEnd:
    """What came of a call.

    Attributes:
        request: whose call it was.
        returned: what the function returned; with scope ``all``, a value of those that go on by
            their ids.
        time_s: when it ended on the run's clock; None: now.
    """

    request: RequestId
    returned: Returned
    time_s: float | None = None


class CallRunner(ABC):
    """Runs calls beside the engines."""

    @abstractmethod
    def submit(self, request: RequestId, call: Call, now_s: float) -> None:
        """Take a call; its end is reported once by :meth:`take`."""

    @abstractmethod
    def take(self, now_s: float) -> Sequence[CallEnd]:
        """Return the calls that have ended by now."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether there are calls whose end was not reported."""

    def next_s(self) -> float:
        """Return when the next call ends; inf: nobody knows."""
        return float("inf")

    @abstractmethod
    def close(self) -> None:
        """Give up what has not ended; safe to call twice."""


class ImitatedCalls(CallRunner):
    """Calls that take their time and do nothing."""

    def __init__(self) -> None:
        """Begin with none."""
        self._waiting: dict[int, list[tuple[int, Call, float]]] = defaultdict(list)
        self._ends: list[tuple[float, RequestId, Any]] = []
        self._free: dict[int, list[float]] = {}

    def submit(self, request: RequestId, call: Call, now_s: float) -> None:
        """Take a call."""
        self._waiting[request[0]].append((request[1], call, now_s))

    def _begin(self) -> None:
        """Begin what was submitted: of one moment in the order of the table."""
        for node, calls in self._waiting.items():
            for r, call, now_s in sorted(calls, key=lambda c: (c[2], c[0])):
                free = self._free.setdefault(node, [0.0] * call.workers)
                end_s = max(now_s, heapq.heappop(free)) + call.seconds
                heapq.heappush(free, end_s)
                heapq.heappush(self._ends, (end_s, (node, r), call.value))
        self._waiting.clear()

    def take(self, now_s: float) -> Sequence[CallEnd]:
        """Return the calls that have ended by now."""
        self._begin()
        ended = []
        while self._ends and self._ends[0][0] <= now_s + 1e-9 * max(1.0, now_s):
            end_s, request, value = heapq.heappop(self._ends)
            ended.append(CallEnd(request, Returned("value", value), min(end_s, now_s)))
        return ended

    def next_s(self) -> float:
        """Return when the next call ends."""
        self._begin()
        return self._ends[0][0] if self._ends else float("inf")

    @property
    def busy(self) -> bool:
        """Whether there are calls whose end was not reported."""
        return bool(self._ends or self._waiting)

    def close(self) -> None:
        """Forget everything."""
        self._ends.clear()
        self._waiting.clear()


class WorkerCalls(CallRunner):
    """Calls in processes that can be killed, as many per function as it asks for."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._ended: queue.SimpleQueue[CallEnd] = queue.SimpleQueue()
        self._pools: dict[int, _Pool] = {}
        self._open = 0

    def prepare(self, node: int, like: Call) -> None:
        """Start the processes of a node's function, which import it before it has rows."""
        self._pools[node] = _Pool(like, self._ended)

    def submit(self, request: RequestId, call: Call, now_s: float) -> None:
        """Take a call."""
        del now_s
        if request[0] not in self._pools:
            self._pools[request[0]] = _Pool(call, self._ended)
        self._open += 1
        self._pools[request[0]].calls.put((request, call))

    def take(self, now_s: float) -> Sequence[CallEnd]:
        """Return the calls that have ended."""
        del now_s
        found = []
        while not self._ended.empty():
            found.append(self._ended.get())
        self._open -= len(found)
        return found

    @property
    def busy(self) -> bool:
        """Whether there are calls whose end was not reported."""
        return self._open > 0

    def close(self) -> None:
        """End every worker."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._open = 0


class _Pool:
    """The workers of one function."""

    def __init__(self, like: Call, ended: queue.SimpleQueue[CallEnd]) -> None:
        self.calls: queue.SimpleQueue[tuple[RequestId, Call] | None] = queue.SimpleQueue()
        self._ended = ended
        self._closed = False
        self._workers = [IsolatedWorker() for _ in range(like.workers)]
        for worker in self._workers:
            threading.Thread(target=self._serve, args=(worker, like), daemon=True).start()

    def close(self) -> None:
        self._closed = True
        for worker in self._workers:
            self.calls.put(None)
            worker.kill()

    def _serve(self, worker: IsolatedWorker, like: Call) -> None:
        """Import the function and take calls until there are none."""
        if like.function is not None:  # what is wrong with it, its calls will tell
            worker.try_call(describe_function, _IMPORT_S, like.function, like.scope)
        self._take_calls(worker)
        if self._closed:  # it may have been started since
            worker.close()

    def _take_calls(self, worker: IsolatedWorker) -> None:
        """Run what is asked, several at once where many wait."""
        while (first := self.calls.get()) is not None:
            call, mine = first[1], [first]
            most = 1 if call.scope == "all" else MOST_ROWS
            most = call.batch_size if call.scope == "batch" else most
            while len(mine) < most and not self.calls.empty():
                try:
                    more = self.calls.get_nowait()
                except queue.Empty:  # another worker was quicker
                    break
                if more is None:
                    return
                mine.append(more)
            for end in self._run(worker, mine):
                if self._closed:
                    return
                self._ended.put(end)

    def _run(
        self, worker: IsolatedWorker, calls: Sequence[tuple[RequestId, Call]]
    ) -> list[CallEnd]:
        """Return what came of calls of one function."""
        call = calls[0][1]
        rows = [row for _, c in calls for row in c.rows]
        assert call.function is not None
        limit_s = call.limit_s * (1 if call.scope == "all" else len(calls)) + GRACE_S
        answer = worker.try_call(
            call_function, limit_s, call.function, call.scope, rows, call.limit_s, call.most
        )
        if answer.failure is None:
            if call.scope == "all":
                return [CallEnd(calls[0][0], _together(rows, answer.value))]
            return [CallEnd(r, v) for (r, _), v in zip(calls, answer.value, strict=True)]
        if answer.failure.kind in ("timeout", "died") and len(calls) > 1 and not self._closed:
            return [end for one in calls for end in self._run(worker, [one])]
        failed = Returned("failed", reason=f"the function {answer.failure.text}")
        return [CallEnd(r, failed) for r, _ in calls]


def _together(rows: Sequence[Row], returned: Sequence[Returned]) -> Returned:
    """Return what a call of all rows came to: values of those that go on, by id."""
    bad = next((r for r in returned if r.kind in ("failed", "rejected")), None)
    if bad is not None:
        return replace(bad, kind="failed")
    values: Mapping[str, Any] = {
        str(row["id"]): one.value
        for row, one in zip(rows, returned, strict=True)
        if one.kind == "value"
    }
    return Returned("value", dict(values), seconds=sum(r.seconds for r in returned))
