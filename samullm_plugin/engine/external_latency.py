"""Runs whose iteration seconds come from a model outside the compiled loop.

The loop runs ahead without a clock and notes the composition of its steps; the model then tells
their seconds, many at a time. In the meantime the loop counts in steps: "after step 5" stands for
the moment step 5 ends. Where a request arrives by time in between, the loop is set back and told
after which step that was.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np

from samullm_plugin.engine import records as at
from samullm_plugin.engine.initial_state import NO_LIMIT
from samullm_plugin.engine.queues import push_arrival
from samullm_plugin.engine.records import Array
from samullm_plugin.engine.state import EngineState
from samullm_plugin.engine.workload import Workload
from samullm_plugin.errors import SamullmError
from samullm_plugin.model.latency import LONGEST_S, StepModel, StepTable
from samullm_plugin.model.types import Floats

_MOST_ROWS = 32_768
"""Steps evaluated at once; bounds the work done in vain before an arrival or a stop."""
_WORTH_SETTING_BACK = 24
"""Fewer steps until the next arrival are run one by one, which needs no way back."""


class ExternalRun:
    """One run in progress; see the module."""

    def __init__(
        self,
        state: EngineState,
        workload: Workload,
        model: StepModel,
        stop_s: float,
        release_delay_s: float,
        enlarge_log: Callable[[EngineState], None],
    ) -> None:
        """Prepare a run of ``state``, which was made without a latency."""
        self.state = state
        self.ends = np.zeros(1024)  # ends[k]: when k steps have ended
        self.starts = np.zeros(1024)
        self.evaluated = 0
        self._model = model
        self._stop_s = stop_s
        self._delay_s = release_delay_s
        self._enlarge_log = enlarge_log
        self._own_s = workload.arrival_s
        self._idle_until = 0.0
        self._to_come: list[tuple[float, int]] = []  # time, request
        self._admitted = 0
        if workload.arrival_s is not None:
            waits = state.requests["num_predecessors"] > 0
            for request in np.flatnonzero(~waits).tolist():
                heapq.heappush(self._to_come, (float(workload.arrival_s[request]), request))

    def run(self) -> int:
        """Run to the end or the stop; return which (see ``records``)."""
        while True:
            self._admit()
            self.state.s.more_to_come = bool(self._to_come)
            rows = self._rows_ahead()
            may_be_set_back = self._stop_s < math.inf or (rows > 1 and self._to_come)
            back = self.state.copy() if may_be_set_back else None
            first = int(self.state.s.rows)
            why = self._advance(first + rows)
            self._evaluate(first)
            valid, stopped = self._valid_rows(first)
            if valid < self.state.s.rows:
                assert back is not None
                self._set_back(back, valid)
                if stopped:
                    return at.STOPPED
                continue
            self._expect_released()
            if why in (at.NEVER_FITS, at.NOT_PRIVATE) or (why == at.DONE and not self._to_come):
                return why
            if why in (at.DONE, at.IDLE):
                arrival_s = self._to_come[0][0]
                if arrival_s > self._stop_s:
                    return at.STOPPED
                self._idle_until = max(self._now(), arrival_s)

    def seconds(self, steps: Floats) -> Floats:
        """Turn moments counted in steps into seconds; inf stays."""
        known = np.isfinite(steps)
        result = np.full(len(steps), math.inf)
        result[known] = self.ends[steps[known].astype(np.int64)]
        return result

    def _now(self) -> float:
        """Return when the scheduler is called next, in seconds."""
        call = float(self.ends[int(self.state.s.next_call)])
        return max(call, self._idle_until) if self.state.s.num_running == 0 else call

    def _expect_released(self) -> None:
        """Note when the requests that were just released arrive."""
        s = self.state.s
        for j in range(int(s.num_released)):
            request = int(self.state.requests[j].released)
            ready = float(self.ends[int(self.state.s.next_call)]) + self._delay_s
            own = 0.0 if self._own_s is None else float(self._own_s[request])
            heapq.heappush(self._to_come, (max(ready, own), request))
        s.num_released = 0

    def _admit(self) -> None:
        """Hand over what has arrived by the next call of the scheduler."""
        now = self._now()
        while self._to_come and self._to_come[0][0] <= now:
            _, request = heapq.heappop(self._to_come)
            state = self.state
            call = float(state.s.next_call)
            push_arrival(state.s, state.requests, call, self._admitted, request)
            self._admitted += 1

    def _rows_ahead(self) -> int:
        """Return how many steps to run before asking the model."""
        done = self.evaluated
        horizon = min(self._to_come[0][0] if self._to_come else math.inf, self._stop_s)
        if horizon == math.inf:
            return _MOST_ROWS
        if done == 0:
            return 1
        recent = max(done - 64, 0)
        pace = (self.ends[done] - self.starts[recent]) / (done - recent)
        ahead = (horizon - self.ends[done]) / max(pace, 1e-12)
        if ahead < _WORTH_SETTING_BACK:
            return 1
        return int(min(1.05 * ahead + 2, _MOST_ROWS))

    def _advance(self, most_rows: int) -> int:
        state = self.state
        state.s.max_rows = most_rows
        why = state.advance()
        while why == at.LOG_FULL:
            self._enlarge_log(state)
            why = state.advance()
        state.s.max_rows = NO_LIMIT
        return why

    def _evaluate(self, first: int) -> None:
        """Ask the model for the seconds of the steps since ``first``."""
        last = int(self.state.s.rows)
        self.evaluated = last
        if last == first:
            return
        seconds = np.asarray(self._model.step_seconds(step_table(self.state.log[first:last])))
        if seconds.shape != (last - first,) or not ((seconds >= 0) & (seconds <= LONGEST_S)).all():
            raise SamullmError(
                f"latency model {type(self._model).__name__}: step_seconds returned shape "
                f"{seconds.shape} or a value that is not between 0 and {LONGEST_S:,.0f} s for "
                f"{last - first} steps"
            )
        if last + 2 > len(self.ends):
            self.ends, self.starts = (
                np.concatenate((a, np.zeros(last + 2))) for a in (self.ends, self.starts)
            )
        begin = max(self.ends[first], self._idle_until)
        # summed up one after the other, as the compiled loop does
        self.ends[first + 1 : last + 1] = np.cumsum(np.concatenate(((begin,), seconds)))[1:]
        self.starts[first] = begin
        self.starts[first + 1 : last] = self.ends[first + 1 : last]

    def _valid_rows(self, first: int) -> tuple[int, bool]:
        """Return how many steps happened as the loop ran them, and whether the stop cut them."""
        last = int(self.state.s.rows)
        ends = self.ends[first : last + 1]
        in_time = first + int(np.searchsorted(ends[1:], self._stop_s, side="right"))
        if self._to_come:
            # The first call of the scheduler that should have seen the arrival came after:
            seen = first + int(np.searchsorted(ends, self._to_come[0][0], side="left"))
            if seen <= in_time and seen < min(last, self.state.s.next_call):
                return seen, False
        return in_time, in_time < last

    def _set_back(self, back: EngineState, row: int) -> None:
        """Run again from ``back`` to ``row`` steps."""
        now = self.state
        back.log, back.entries, back.preempted = now.log, now.entries, now.preempted
        self.state = back
        self.evaluated = row
        if back.s.rows < row:
            self._advance(row)


def step_table(log: Array) -> StepTable:
    """Return the compositions in recorded rows."""
    return StepTable(**{f.name: log[f.name].copy() for f in fields(StepTable)})
