"""One simulated replica: what it was given, what is foreseen, and when it finishes what."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from samullm_plugin import EngineSpec, ModeCosts
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
from samullm_plugin.model.types import Floats, Ints


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


@dataclass(slots=True, eq=False)
class SimulatedEngine:
    """A replica on the virtual clock.

    Attributes:
        spec: what was asked for.
        config: its scheduler settings.
        costs: its true costs.
        started_s: when its start began.
        ready_s: when it can serve.
        reported_ready: the coordinator knows.
        submitted: requests it was given, by index, in order of submission.
        foreseen: requests it is expected to be given, by index.
        foreseen_at: when each of these is expected, in order of time.
        rows: requests of the simulated run.
        job: the simulation.
        run: its result.
    """

    spec: EngineSpec
    config: EngineConfig
    costs: ModeCosts
    started_s: float
    ready_s: float
    reported_ready: bool = False
    submitted: dict[int, Submission] = field(default_factory=dict)
    foreseen: dict[int, Submission] = field(default_factory=dict)
    foreseen_at: deque[tuple[float, int]] = field(default_factory=deque)
    rows: list[Submission] = field(default_factory=list)
    job: EngineJob | None = None
    run: EngineRun | None = None
    _finish_s: Floats = field(default_factory=lambda: np.empty(0))
    _order: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    _next: int = 0
    _steps_taken: int = 0
    _prefixes: tuple[Ints, Ints] | None = None
    _last_finish_s: tuple[float, float] = (-1.0, 0.0)

    def since_ready(self, clock_s: float, *, own: bool) -> float:
        """Return the seconds since it is ready.

        Args:
            clock_s: now.
            own: to the bit the moment of its own last finish, if that is now: what waited for it
                comes then. Anything else comes by the clock, a rounding error apart: the plan
                simulator's order of requests that come at one moment.
        """
        at_s, after_s = self._last_finish_s
        return after_s if own and clock_s == at_s else max(clock_s - self.ready_s, 0.0)

    def use_prefixes(self, prefix_id: Ints, prefix_tokens: Ints) -> None:
        """Let requests share prefixes; arrays by request index of the node."""
        self._prefixes = (prefix_id, prefix_tokens)

    def simulate(self, cache: EngineCache) -> None:
        """Simulate what was submitted and is foreseen, to its end."""
        foreseen = sorted(self.foreseen.values(), key=lambda s: (s.arrival_s, s.request))
        self.rows = [*self.submitted.values(), *foreseen]
        self._next = 0
        if not self.rows:
            self.job = self.run = None
            self._finish_s, self._order = np.empty(0), np.empty(0, np.int64)
            return
        self.job = EngineJob(self.config, self._workload(), self.costs.latency)
        self.run = simulate_engines([self.job], cache=cache)[0]
        self._finish_s = self.ready_s + self.run.finish_s
        self._order = np.argsort(self._finish_s, kind="stable")

    def _workload(self) -> Workload:
        rows = self.rows
        requests = np.array([s.request for s in rows], np.int64)
        arrival = np.array([s.arrival_s for s in rows])
        index = indptr = None
        if any(s.after for s in rows):
            at = {s.request: i for i, s in enumerate(rows)}
            pairs = sorted((at[q], s.request, i) for i, s in enumerate(rows) for q in s.after)
            index = np.array([i for _, _, i in pairs], np.int64)
            counts = np.bincount([q for q, _, _ in pairs], minlength=len(rows))
            indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        by_priority = self.config.scheduling_policy == "priority"
        return Workload(
            np.array([s.prompt_tokens for s in rows], np.int64),
            np.array([s.output_tokens for s in rows], np.int64),
            arrival_s=arrival if arrival.any() else None,
            priority=np.array([s.priority for s in rows], np.int64) if by_priority else None,
            prefix_id=None if self._prefixes is None else self._prefixes[0][requests],
            prefix_tokens=None if self._prefixes is None else self._prefixes[1][requests],
            release_index=index,
            release_indptr=indptr,
        )

    def finish_times(self) -> Iterator[tuple[int, float]]:
        """Yield the requests of the run and when each finishes, on the clock."""
        for row, at in zip(self.rows, self._finish_s.tolist(), strict=True):
            yield row.request, at

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
        """Return the requests that have finished by then and were not returned before."""
        found = []
        while self.next_finish_s() <= by_s:
            row = int(self._order[self._next])
            found.append(self.rows[row])
            if self.run is not None:
                self._last_finish_s = (self._finish_s[row], float(self.run.finish_s[row]))
            self._next += 1
        return found

    def overdue(self, clock_s: float) -> bool:
        """Return whether a foreseen request has not come when it was expected."""
        while self.foreseen_at and self.foreseen_at[0][1] not in self.foreseen:
            self.foreseen_at.popleft()
        return bool(self.foreseen_at) and self.foreseen_at[0][0] <= clock_s

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
        reported = {self.rows[i].request for i in self._order[: self._next].tolist()}
        run = self._until(clock_s)
        tokens = [0] * len(self.rows) if run is None else run.generated_tokens.tolist()
        by_request = {s.request: n for s, n in zip(self.rows, tokens, strict=True)}
        return [
            (s, by_request.get(s.request, 0))
            for s in self.submitted.values()
            if s.request not in reported
        ]

    def progress(self, clock_s: float) -> dict[int, int]:
        """Return the tokens of submitted requests that have some and are not reported."""
        run = self._until(clock_s)
        if run is None:
            return {}
        tokens = run.generated_tokens.copy()
        tokens[self._order[: self._next]] = 0
        begun = ((self.rows[i].request, int(tokens[i])) for i in np.flatnonzero(tokens).tolist())
        return {request: n for request, n in begun if request in self.submitted}

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


def requests_of(engines: Sequence[SimulatedEngine]) -> set[int]:
    """Return the requests given to any of these engines."""
    return {r for e in engines for r in e.submitted}
