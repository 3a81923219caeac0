"""One simulated replica: what it was given, what is foreseen, and when it finishes what."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samullm_plugin import EngineSpec, ModeCosts, RunError
from samullm_plugin.engine import (
    EngineCache,
    EngineConfig,
    EngineJob,
    EngineRun,
    StepTable,
    Workload,
    simulate_engine,
    simulate_engines,
)
from samullm_plugin.host.interfaces.executor import REFILL
from samullm_plugin.model.types import Bools, Floats, Ints


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as an engine has it, or as it is foreseen.

    Attributes:
        request: index in its node's table.
        arrival_s: seconds after the engine is ready, at least 0.
        prompt_tokens: what is to be prefilled.
        output_tokens: what it generates here.
        cut: it ends at a limit.
        after: requests of this engine at whose end it arrives, if later than ``arrival_s``.
        priority: lower first under policy ``priority``.
    """

    request: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    cut: bool
    after: tuple[int, ...] = ()
    priority: int = 0


class Submissions:
    """Requests as columns: objects for each of millions take ten times the memory.

    Attributes:
        after: by request, that of its submission, where it waits for others.
    """

    _TYPES: Mapping[str, str] = {
        "request": "q", "arrival_s": "d", "prompt_tokens": "q", "output_tokens": "q", "cut": "b",
        "priority": "q",
    }  # fmt: skip

    def __init__(self) -> None:
        """Begin with none."""
        self.after: dict[int, tuple[int, ...]] = {}
        self._columns = {name: array(kind) for name, kind in self._TYPES.items()}

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._columns["request"])

    def add(self, submission: Submission) -> None:
        """Add one at the end."""
        for name, column in self._columns.items():
            column.append(getattr(submission, name))
        if submission.after:
            self.after[submission.request] = submission.after

    def extend(self, **columns: Any) -> None:
        """Add several at the end: arrays by the names of a submission's attributes."""
        for name, column in self._columns.items():
            column.frombytes(np.ascontiguousarray(columns[name], column.typecode).tobytes())

    def __getitem__(self, k: int) -> Submission:
        """Return one of them."""
        c = self._columns
        request = c["request"][k]
        return Submission(
            request,
            c["arrival_s"][k],
            c["prompt_tokens"][k],
            c["output_tokens"][k],
            bool(c["cut"][k]),
            self.after.get(request, ()),
            c["priority"][k],
        )

    def column(self, name: str) -> Any:
        """Return a copy of one attribute of all of them, shape ``(len(self),)``."""
        return np.array(self._columns[name])


class Foreseen:
    """Requests that an engine is expected to be given, in the order in which they arrive.

    Args:
        submissions: in that order.
    """

    def __init__(self, submissions: Submissions) -> None:
        self.submissions = submissions
        self._requests = submissions.column("request")
        self._by_request = np.argsort(self._requests, kind="stable")
        self._sorted = self._requests[self._by_request]
        self.expect(np.full(len(submissions), np.inf))
        self.open: Bools = np.ones(len(submissions), bool)
        self._count = len(submissions)

    def expect(self, due_s: Floats) -> None:
        """Take note of when each is expected, shape ``(len(submissions),)``."""
        self._due_s, self._by_due, self._next = due_s, np.argsort(due_s, kind="stable"), 0

    def __len__(self) -> int:
        """Return how many are expected still."""
        return self._count

    def requests(self) -> Ints:
        """Return the requests that are expected still."""
        return np.asarray(self._requests[self.open])

    def take(self, request: int) -> Submission | None:
        """Return how a request was expected, which is over now; None if it was not."""
        at = int(self._sorted.searchsorted(request))
        if at == len(self._sorted) or self._sorted[at] != request:
            return None
        k = int(self._by_request[at])
        if not self.open[k]:
            return None
        self.open[k] = False
        self._count -= 1
        return self.submissions[k]

    def next_due_s(self) -> float:
        """Return when the next is expected; inf if none is."""
        while self._next < len(self._by_due) and not self.open[self._by_due[self._next]]:
            self._next += 1
        if self._next == len(self._by_due):
            return float("inf")
        return float(self._due_s[self._by_due[self._next]])


def nothing_foreseen() -> Foreseen:
    """Return no expectation."""
    return Foreseen(Submissions())


@dataclass(slots=True, eq=False)
class SimulatedEngine:
    """A replica on the virtual clock.

    Attributes:
        spec: what was asked for.
        config: its scheduler settings.
        costs: its true costs.
        started_s: when its start began.
        ready_s: when it can serve.
        window: how many requests it is given before it reports some; None: all there are.
        reported_ready: the coordinator knows.
        submitted: requests it was given, in order of submission.
        held: those of them that it has not reported, and their places in ``submitted``.
        foreseen: requests it is expected to be given. With a window some of them may be there and
            wait outside for others to finish: an engine decides as if it had them.
        job: the simulation.
        run: its result.
    """

    spec: EngineSpec
    config: EngineConfig
    costs: ModeCosts
    started_s: float
    ready_s: float
    window: int | None = None
    reported_ready: bool = False
    submitted: Submissions = field(default_factory=Submissions)
    held: dict[int, int] = field(default_factory=dict)
    foreseen: Foreseen = field(default_factory=nothing_foreseen)
    job: EngineJob | None = None
    run: EngineRun | None = None
    _requests: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    _cut: Bools = field(default_factory=lambda: np.empty(0, bool))
    _finish_s: Floats = field(default_factory=lambda: np.empty(0))
    _order: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    _next: int = 0
    _steps_taken: int = 0
    _prefixes: tuple[Ints, Ints] | None = None
    _last_finish_s: tuple[float, float] = (-1.0, 0.0)

    def since_ready(self, clock_s: float, *, own: bool, others: bool) -> float:
        """Return the seconds since it is ready.

        What waited for this engine's own last finish comes, if that is now, to the bit at that
        moment. Anything else comes by the clock, a rounding error apart: the plan simulator's order
        of requests that come at one moment.

        Args:
            clock_s: now.
            own: a request of this engine has finished now that was waited for.
            others: so has one of another node.
        """
        at_s, after_s = self._last_finish_s
        by_clock_s = max(clock_s - self.ready_s, 0.0)
        if not own or clock_s != at_s:
            return by_clock_s
        return max(after_s, by_clock_s) if others else after_s

    def use_prefixes(self, prefix_id: Ints, prefix_tokens: Ints) -> None:
        """Let requests share prefixes; arrays by request index of the node."""
        self._prefixes = (prefix_id, prefix_tokens)

    @property
    def has_room(self) -> bool:
        """Return whether it would have been given what waits for it."""
        if self.window is None:
            return True
        return (self.window - len(self.held)) * REFILL >= self.window

    def add(self, submission: Submission) -> None:
        """Take a request."""
        self.held[submission.request] = len(self.submitted)
        self.submitted.add(submission)

    def simulate(self, cache: EngineCache) -> None:
        """Simulate what was submitted and is foreseen, to its end."""
        expected, open_ = self.foreseen.submissions, self.foreseen.open
        rows = {
            name: np.concatenate([self.submitted.column(name), expected.column(name)[open_]])
            for name in ("request", "arrival_s", "prompt_tokens", "output_tokens", "cut")
        }
        self._next, self._requests = 0, rows["request"]
        self._cut = rows["cut"].astype(bool)
        if not len(self._requests):
            self.job = self.run = None
            self._finish_s, self._order = np.empty(0), np.empty(0, np.int64)
            return
        self.job = EngineJob(self.config, self._workload(rows), self.costs.latency)
        self.run = simulate_engines([self.job], cache=cache)[0]
        self._finish_s = self.ready_s + self.run.finish_s
        self._order = np.argsort(self._finish_s, kind="stable")

    def _workload(self, rows: Mapping[str, Any]) -> Workload:
        requests, arrival = rows["request"], rows["arrival_s"]
        expected = self.foreseen.submissions
        open_ = set(self.foreseen.requests().tolist()) if expected.after else ()
        after = {r: waits for r, waits in expected.after.items() if r in open_}
        after |= self.submitted.after
        index = indptr = None
        if after:
            at = {r: i for i, r in enumerate(requests.tolist())}
            pairs = sorted((at[q], r, at[r]) for r, waits in after.items() for q in waits)
            index = np.array([i for _, _, i in pairs], np.int64)
            counts = np.bincount([q for q, _, _ in pairs], minlength=len(requests))
            indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        priority = None
        if self.config.scheduling_policy == "priority":  # nothing is foreseen then
            priority = self.submitted.column("priority")
        return Workload(
            rows["prompt_tokens"],
            rows["output_tokens"],
            arrival_s=arrival if arrival.any() else None,
            priority=priority,
            prefix_id=None if self._prefixes is None else self._prefixes[0][requests],
            prefix_tokens=None if self._prefixes is None else self._prefixes[1][requests],
            release_index=index,
            release_indptr=indptr,
        )

    def finish_times(self) -> tuple[Ints, Floats]:
        """Return the requests of the run and when each finishes, on the clock."""
        return self._requests, self._finish_s

    def next_finish_s(self) -> float:
        """Return when the next unreported request finishes."""
        if self._next < len(self._order):
            return float(self._finish_s[self._order[self._next]])
        return float("inf")

    def skip_finished(self, by_s: float) -> None:
        """Take what finished by then for reported."""
        while self.next_finish_s() <= by_s:
            self._next += 1

    def take_finished(self, by_s: float) -> list[Submission]:
        """Return the requests that have finished by then and were not returned before.

        Raises:
            RunError: if one finished that waits outside.
        """
        found = []
        while self.next_finish_s() <= by_s:
            row = int(self._order[self._next])
            request = int(self._requests[row])
            place = self.held.pop(request, None)
            if place is None:
                raise RunError(
                    f"executor simulated: request {request} of engine {self.spec.key} finishes "
                    "before it was given; its window is too small"
                )
            found.append(self.submitted[place])
            if self.run is not None:
                self._last_finish_s = (self._finish_s[row], float(self.run.finish_s[row]))
            self._next += 1
        return found

    def overdue(self, clock_s: float) -> bool:
        """Return whether a foreseen request has not come when it was expected."""
        return self.has_room and self.foreseen.next_due_s() <= clock_s

    def _until(self, clock_s: float, *, record_steps: bool = False) -> EngineRun | None:
        if self.job is None or clock_s <= self.ready_s:
            return None
        return simulate_engine(
            self.job.config,
            self.job.workload,
            self.job.latency,
            # an iteration that ends right now must not be cut by rounding
            stop_s=clock_s - self.ready_s + 4 * float(np.spacing(clock_s)),
            record_steps=record_steps,
        )

    def generated(self, clock_s: float) -> list[tuple[Submission, int]]:
        """Return the submitted requests that are not reported, with the tokens generated so far."""
        tokens = self.progress(clock_s)
        return [(self.submitted[k], tokens.get(r, 0)) for r, k in self.held.items()]

    def progress(self, clock_s: float) -> dict[int, int]:
        """Return the tokens of submitted requests that have some and are not reported."""
        run = self._until(clock_s)
        if run is None:
            return {}
        tokens = run.generated_tokens.copy()
        tokens[self._order[: self._next]] = 0
        rows = np.flatnonzero(tokens)
        begun = zip(self._requests[rows].tolist(), tokens[rows].tolist(), strict=True)
        return {request: n for request, n in begun if request in self.held}

    def take_steps(self, clock_s: float) -> tuple[StepTable, Floats] | None:
        """Return the iterations up to now that were not returned before, and their seconds."""
        run = self._until(clock_s, record_steps=True)
        if run is None or run.steps is None:
            return None
        table = run.steps.table
        part = slice(self._steps_taken, len(table))
        self._steps_taken = len(table)
        steps = StepTable(
            table.num_seqs[part],
            table.num_tokens[part],
            table.prefill_seqs[part],
            table.prefill_tokens[part],
            table.prefill_pairs[part],
            table.context_tokens[part],
            table.longest_tokens[part],
        )
        return steps, np.asarray(self.costs.latency.step_seconds(steps))
