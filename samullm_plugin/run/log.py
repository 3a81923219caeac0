"""The events of a run: written to the journal, then passed to observers and progress displays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from samullm_plugin.host.interfaces.observer import RunEvent, RunInfo, StageRecord
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.plan import Plan, Stage
from samullm_plugin.run.journal import Journal
from samullm_plugin.run.results import RequestId

SETTLED = ("finished", "skipped", "failed")

BULKY = ("text", "token_ids", "prompt_token_ids", "logprobs", "prompt_logprobs", "value")
"""Fields that are written to the journal but not kept in memory."""


def without_retried(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return events without the failures of requests that were asked again afterwards."""
    found: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] == "retry":
            reopened = {r["node"] for r in found if r["kind"] == "failed"}
            found = [
                r
                for r in found
                if r["kind"] != "failed"
                and not (r["kind"] == "node_finished" and r["node"] in reopened)
            ]
        found.append(dict(record))
    return found


class RunLog:
    """Collects events and writes them together.

    Attributes:
        info: the run, as observers see it.
        records: every event so far but those of :meth:`add_settled`, without contents.
        written: called with the place in the journal of a settled request's record, and its bytes.
    """

    def __init__(
        self,
        info: RunInfo,
        journal: Journal | None = None,
        host: PluginHost | None = None,
    ) -> None:
        """Start a log.

        Args:
            info: the run.
            journal: where events are kept; None: nowhere.
            host: whose observers are called; None: nobody's.
        """
        self.info = info
        self.records: list[dict[str, Any]] = []
        self._journal = journal
        self._listeners: list[Callable[[RunEvent], None]] = []
        self._host = host if host is not None and host.has_observers else None
        self._pending: list[tuple[dict[str, Any], RequestId | None]] = []
        self.written: Callable[[RequestId, int, int], None] | None = None

    @property
    def journal(self) -> Journal | None:
        """Return where events are kept; None: nowhere."""
        return self._journal

    def add_listener(self, listener: Callable[[RunEvent], None]) -> None:
        """Call ``listener`` with each event once it is in the journal."""
        self._listeners.append(listener)

    def add(self, time_s: float, kind: str, **fields: Any) -> None:
        """Add an event; it is written by the next :meth:`flush`."""
        record = {"time_s": time_s, "kind": kind, **fields}
        self._pending.append((record, None))
        self.records.append({k: v for k, v in record.items() if k not in BULKY})

    def add_settled(self, request: RequestId, record: dict[str, Any]) -> None:
        """Add what became of a request; nothing of it is kept here once it is written.

        Args:
            request: whose record it is.
            record: with its time and kind.
        """
        self._pending.append((record, request))

    def flush(self) -> None:
        """Write the pending events, then pass them to observers.

        Raises:
            RunError: if the disk is full or fails.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        if self._journal is not None:
            places = self._journal.append([record for record, _ in pending])
            if self.written is not None:
                for (_, request), (place, end) in zip(pending, pairwise(places), strict=True):
                    if request is not None:
                        self.written(request, place, end - place)
        if self._host is None and not self._listeners:
            return
        for rest, _ in pending:
            event = RunEvent(rest.pop("time_s"), rest.pop("kind"), rest)
            if self._host is not None:
                self._host.on_run_event(self.info, event)
            for listener in self._listeners:
                listener(event)

    def before_stage(self, stage: Stage) -> None:
        """Call the observers' ``before_stage_run``."""
        if self._host is not None:
            self._host.before_stage_run(self.info, stage)

    def after_stage(self, stage: Stage, record: StageRecord) -> None:
        """Call the observers' ``after_stage_run``."""
        if self._host is not None:
            self._host.after_stage_run(self.info, stage, record)


@dataclass(frozen=True, slots=True)
class _OpenStage:
    """A stage that has begun."""

    stage: Stage
    started_s: float
    finished_before: frozenset[str]


class StageTracker:
    """Logs which stages of a run have begun and ended, over all its plans."""

    def __init__(self, log: RunLog, *, stage: int = -1, stages_run: int = 0) -> None:
        """Begin where the run begins or is resumed.

        Args:
            log: where the events go.
            stage: index of the current stage, which is entered again; -1 before the first.
            stages_run: stages that have ended, over all plans.
        """
        self._log = log
        self._ended = stages_run
        self._entered = max(stage, 0) - 1
        self._open: _OpenStage | None = None

    def enter(self, plan: Plan, current: int, now_s: float, finished: set[str]) -> None:
        """Log that a stage is current; those before it that were never entered have passed.

        Args:
            plan: the plan.
            current: index of the stage.
            now_s: the run's clock.
            finished: names of the nodes that have finished.
        """
        for index in range(self._entered + 1, current + 1):
            self.end(now_s, finished)
            self._open = _OpenStage(plan.stages[index], now_s, frozenset(finished))
            self._log.add(now_s, "stage", stage=index, number=self._ended)
            self._log.before_stage(plan.stages[index])
        self._entered = max(self._entered, current)

    def end(self, now_s: float, finished: set[str]) -> None:
        """Log that the current stage has ended, if there is one."""
        if self._open is None:
            return
        ended, self._open = self._open, None
        nodes = tuple(sorted(finished - ended.finished_before))
        record = StageRecord(self._ended, ended.started_s, now_s, nodes)
        self._ended += 1
        self._log.after_stage(ended.stage, record)

    def begin_plan(self, now_s: float, finished: set[str]) -> None:
        """Start counting stages anew: another plan holds from now on."""
        self.end(now_s, finished)
        self._entered = -1
