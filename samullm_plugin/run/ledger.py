"""What has become of every request of a run, and who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np

from samullm_plugin.model.application import Application
from samullm_plugin.model.types import Bools, Floats, Ints
from samullm_plugin.run.results import RequestId, Result, Results, single_numbers


class Status(IntEnum):
    """Where a request is; from ``FINISHED`` on it is settled."""

    WAITING = 0
    READY = 1
    SUBMITTED = 2
    FINISHED = 3
    SKIPPED = 4
    FAILED = 5


_FINISHED = int(Status.FINISHED)


def is_call(app: Application, request: RequestId) -> bool:
    """Return whether a request is a call of a Python node whose values are kept by its rows."""
    k = request[0] - len(app.nodes)
    if k < 0:
        return False
    return request[1] < app.python[k].hidden_calls


class Ledger:
    """Status, results and dependencies of all requests.

    Attributes:
        app: the application.
        status: per node, :class:`Status` values, shape ``(n,)``.
        generated: per node, tokens generated so far or in all, shape ``(n,)``.
        prompt_tokens: per node, tokens of the prompts of settled requests, shape ``(n,)``.
        cut: per node, which finished requests' outputs ended at a limit, shape ``(n,)``.
        finish_s: per node, when each request was settled on the run's clock, inf before.
        results: of settled requests.
        calls: by Python node, how many calls were timed, and their seconds in all.
        states: ``status``, the same memory, for single numbers: numpy takes several times as long.
    """

    def __init__(self, app: Application) -> None:
        """Begin with every request waiting."""
        self.app = app
        sizes = [len(n.requests) for n in app.all_nodes]
        self.status = [np.zeros(n, np.int8) for n in sizes]
        self.generated = [np.zeros(n, np.int64) for n in sizes]
        self.finish_s = [np.full(n, np.inf) for n in sizes]
        self.prompt_tokens = [np.zeros(n, np.int64) for n in sizes]
        self.cut = [np.zeros(n, bool) for n in sizes]
        self.results = Results(sizes)
        self.calls: dict[int, tuple[int, float]] = {}
        self._num_models = len(app.nodes)
        self._rows_left: dict[RequestId, int] = {}
        self._open = [np.diff(n.requests.input_indptr).astype(np.int64) for n in app.all_nodes]
        self._unsettled = list(sizes)
        self._dependents = _dependents(app)
        self.states = single_numbers(self.status)
        self._open_views = single_numbers(self._open)
        tables = [n.requests for n in app.all_nodes]
        self._input_views = [
            single_numbers((t.input_indptr, t.input_node, t.input_request)) for t in tables
        ]
        self._views = [
            single_numbers(columns)
            for columns in zip(
                self.status, self.finish_s, self.generated, self.prompt_tokens, self.cut,
                *zip(*self._dependents, strict=True), strict=True,
            )
        ]  # fmt: skip

    def first(self) -> Iterator[RequestId]:
        """Yield the unsettled requests that wait for nothing."""
        for i, missing in enumerate(self._open):
            for r in np.flatnonzero((missing == 0) & (self.status[i] == Status.WAITING)).tolist():
                yield i, r

    def inputs(self, request: RequestId) -> list[RequestId]:
        """Return the requests whose outputs a request waits for, in the table's order."""
        starts, nodes, requests = self._input_views[request[0]]
        r = request[1]
        return [(nodes[k], requests[k]) for k in range(starts[r], starts[r + 1])]

    def waiting_for(self, request: RequestId) -> list[RequestId]:
        """Return the requests that wait for the output of a request."""
        starts, nodes, requests = self._dependents[request[0]]
        part = slice(starts[request[1]], starts[request[1] + 1])
        return list(zip(nodes[part].tolist(), requests[part].tolist(), strict=True))

    def inputs_finished(self, request: RequestId) -> bool:
        """Return whether all that a request waits for has finished, and nothing failed."""
        starts, nodes, requests = self._input_views[request[0]]
        r, states = request[1], self.states
        for k in range(starts[r], starts[r + 1]):  # a generator takes twice as long
            if states[nodes[k]][requests[k]] != _FINISHED:
                return False
        return True

    def lacks(self, request: RequestId) -> bool:
        """Return whether an input that a request needs was not taken."""
        table = self.app.all_nodes[request[0]].requests
        if table.input_needed is None:
            return False
        return any(
            table.input_needed[k]
            and self.status[table.input_node[k]][table.input_request[k]] == Status.SKIPPED
            for k in table.entries(request[1])
        )

    def settle(
        self, request: RequestId, status: int, time_s: float, result: Result
    ) -> list[RequestId]:
        """Settle a request.

        Returns:
            The requests all of whose inputs are settled now.
        """
        python = request[0] >= self._num_models
        if not python:  # mostly
            self.results.add(request, result)
            return self.mark(
                request, status, time_s, result.num_tokens, result.prompt_tokens,
                cut=result.finish_reason == "length",
            )  # fmt: skip
        pinned = status == Status.FINISHED and is_call(self.app, request)
        self.results.add(request, result, pinned=pinned)
        cut = result.finish_reason == "length"
        complete = self.mark(
            request, status, time_s, result.num_tokens, result.prompt_tokens, cut=cut
        )
        if result.seconds is not None:
            self.note_call(request[0], result.seconds)
        if pinned:
            if left := self._rows_of(request):
                self._rows_left[request] = left
            else:
                self.results.unpin(request)
        else:
            self._let_go(request)
        return complete

    def mark(
        self,
        request: RequestId,
        status: int,
        time_s: float,
        num_tokens: int = 0,
        prompt_tokens: int = 0,
        *,
        cut: bool = False,
    ) -> list[RequestId]:
        """Settle a request whose result is kept elsewhere; return as :meth:`settle` does."""
        node, r = request
        states, finish_s, generated, prompts, cuts, starts, nodes, requests = self._views[node]
        states[r] = status
        finish_s[r] = time_s
        generated[r] = num_tokens
        prompts[r] = prompt_tokens
        cuts[r] = cut
        self._unsettled[node] -= 1
        complete = []
        for k in range(starts[r], starts[r + 1]):
            i, q = nodes[k], requests[k]
            views = self._open_views[i]
            views[q] = left = views[q] - 1
            if not left:
                complete.append((i, q))
        return complete

    def mark_finished(
        self,
        node: int,
        requests: Ints,
        time_s: Floats,
        num_tokens: Ints,
        prompt_tokens: Ints,
        cut: Bools,
    ) -> None:
        """Settle finished requests of a node whose results are kept elsewhere, as :meth:`mark`.

        Args:
            node: its index.
            requests: different ones, none of them settled.
            time_s: when each finished.
            num_tokens: of their outputs.
            prompt_tokens: of their prompts.
            cut: whose outputs ended at a limit.
        """
        self.status[node][requests] = Status.FINISHED
        self.finish_s[node][requests] = time_s
        self.generated[node][requests] = num_tokens
        self.prompt_tokens[node][requests] = prompt_tokens
        self.cut[node][requests] = cut
        self._unsettled[node] -= len(requests)
        starts, nodes, targets = self._dependents[node]
        first, count = starts[requests], starts[requests + 1] - starts[requests]
        ends = np.cumsum(count)
        entries = np.repeat(first - (ends - count), count) + np.arange(count.sum())
        for i in np.unique(nodes[entries]).tolist():
            np.subtract.at(self._open[i], targets[entries][nodes[entries] == i], 1)

    def note_call(self, node: int, seconds: float) -> None:
        """Count a call of a Python node."""
        count, total_s = self.calls.get(node, (0, 0.0))
        self.calls[node] = count + 1, total_s + seconds

    def _rows_of(self, call: RequestId) -> int:
        """Return how many rows of a call are not settled."""
        indptr, nodes, requests = self._dependents[call[0]]
        part = slice(indptr[call[1]], indptr[call[1] + 1])
        mine = requests[part][nodes[part] == call[0]]
        return int((self.status[call[0]][mine] < Status.FINISHED).sum())

    def _let_go(self, row: RequestId) -> None:
        """Forget what a call has returned once all its rows are settled: they have the values."""
        for at in self.inputs(row):
            if at in self._rows_left:
                self._rows_left[at] -= 1
                if not self._rows_left[at]:
                    del self._rows_left[at]
                    self.results.unpin(at)

    def rows_settled(self, call: RequestId) -> bool:
        """Return whether all rows behind a call are settled."""
        return self._rows_of(call) == 0

    def reopen_failed(self) -> int:
        """Make every failed request wait for its inputs again; return how many there were.

        So do requests that were left out because of one: rows of a call that failed, and what
        waited for them.
        """
        failed = [
            (node, r)
            for node, status in enumerate(self.status)
            for r in np.flatnonzero(status == Status.FAILED).tolist()
        ]
        waiting = list(failed)
        while waiting:
            node, r = waiting.pop()
            if self.status[node][r] == Status.WAITING:
                continue
            self.status[node][r] = Status.WAITING
            self.finish_s[node][r], self.generated[node][r] = np.inf, 0
            self.prompt_tokens[node][r], self.cut[node][r] = 0, False
            self.results.pop((node, r))
            self._unsettled[node] += 1
            indptr, nodes, requests = self._dependents[node]
            for k in range(indptr[r], indptr[r + 1]):
                i, q = int(nodes[k]), int(requests[k])
                self._open[i][q] += 1
                if self.status[i][q] == Status.SKIPPED:
                    waiting.append((i, q))
        return len(failed)

    def settled(self, node: int) -> bool:
        """Return whether all requests of a node are settled."""
        return self._unsettled[node] == 0

    @property
    def all_settled(self) -> bool:
        """Return whether nothing is left to do."""
        return not any(self._unsettled)

    def num_settled(self, node: int) -> int:
        """Return how many requests of a node are settled."""
        return len(self.status[node]) - self._unsettled[node]

    def foreseen(self, running: set[int], untaken: list[Bools | None]) -> list[Bools]:
        """Return per node which requests are settled or will be if nothing else is started.

        Args:
            running: nodes with engines.
            untaken: per node which requests are known to be left out; they settle by themselves.
        """
        found: list[Bools] = [np.zeros(0, bool)] * len(self.app.all_nodes)
        for i in self.app.full_order:
            table, python = self.app.all_nodes[i].requests, i >= len(self.app.nodes)
            done = self.status[i] >= Status.FINISHED
            left_out = untaken[i]
            able = np.full(len(table), i in running or python)
            if left_out is not None:
                able |= left_out
            rows, own = table.input_row, table.input_node == i
            for source in np.unique(table.input_node[~own]):
                part = table.input_node == source
                bad = rows[part][~found[source][table.input_request[part]]]
                able[bad] = False
            found[i] = done | able
            if own.any():
                for r, q in zip(rows[own], table.input_request[own], strict=True):
                    found[i][r] &= found[i][q] or done[r]
        return found


def _dependents(app: Application) -> list[tuple[Ints, Ints, Ints]]:
    """Return per node and request who waits for it: starts, nodes and requests."""
    rows = [np.empty(0, np.int64)] * 4
    for i, node in enumerate(app.all_nodes):
        table = node.requests
        columns = (
            table.input_node,
            table.input_request,
            np.full(len(table.input_node), i),
            table.input_row,
        )
        rows = [np.concatenate(pair) for pair in zip(rows, columns, strict=True)]
    source, request, target, target_request = rows
    result = []
    for i, node in enumerate(app.all_nodes):
        mine = np.flatnonzero(source == i)
        mine = mine[np.argsort(request[mine], kind="stable")]
        counts = np.bincount(request[mine], minlength=len(node.requests))
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        result.append((indptr, target[mine], target_request[mine]))
    return result
