"""What happens in a run, told to the journal, to observers and to whoever shows progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from samullm_plugin.host.interfaces.observer import RunEvent, RunInfo, StageRecord
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.plan import Stage
from samullm_plugin.run.journal import Journal

BULKY = ("text", "token_ids", "prompt_token_ids")
"""Fields that are written to the journal but not kept in memory."""


class RunLog:
    """Collects events and writes them together.

    Attributes:
        info: the run, as observers see it.
        records: every event so far, without the contents of outputs.
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
            host: whose observers are told; None: nobody's.
        """
        self.info = info
        self.records: list[dict[str, Any]] = []
        self._journal = journal
        self._listeners: list[Callable[[RunEvent], None]] = []
        self._host = host if host is not None and host.has_observers else None
        self._pending: list[dict[str, Any]] = []

    def add_listener(self, listener: Callable[[RunEvent], None]) -> None:
        """Call ``listener`` with each event once it is in the journal."""
        self._listeners.append(listener)

    def add(self, time_s: float, kind: str, **fields: Any) -> None:
        """Note an event; it is written by the next :meth:`flush`."""
        record = {"time_s": time_s, "kind": kind, **fields}
        self._pending.append(record)
        self.records.append({k: v for k, v in record.items() if k not in BULKY})

    def flush(self) -> None:
        """Write what was noted, then tell observers.

        Raises:
            RunError: if the disk is full or fails.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        if self._journal is not None:
            self._journal.append(pending)
        if self._host is None and not self._listeners:
            return
        for record in pending:
            rest = {k: v for k, v in record.items() if k not in ("time_s", "kind")}
            event = RunEvent(record["time_s"], record["kind"], rest)
            if self._host is not None:
                self._host.on_run_event(self.info, event)
            for listener in self._listeners:
                listener(event)

    def before_stage(self, stage: Stage) -> None:
        """Tell observers that a stage begins."""
        if self._host is not None:
            self._host.before_stage_run(self.info, stage)

    def after_stage(self, stage: Stage, record: StageRecord) -> None:
        """Tell observers that a stage has ended."""
        if self._host is not None:
            self._host.after_stage_run(self.info, stage, record)
