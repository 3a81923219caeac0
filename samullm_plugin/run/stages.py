"""Which stages of a plan have begun and ended, told to the log and to observers."""

from __future__ import annotations

from dataclasses import dataclass

from samullm_plugin.host.interfaces.observer import StageRecord
from samullm_plugin.model.plan import Plan, Stage
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.starting import Begun


@dataclass(frozen=True, slots=True)
class _OpenStage:
    """A stage that has begun."""

    stage: Stage
    started_s: float
    finished_before: frozenset[str]


class StageBook:
    """Keeps account of the stages of a run, over all its plans."""

    def __init__(self, log: RunLog, begun: Begun) -> None:
        """Begin where the run takes up.

        Args:
            log: is told.
            begun: stages that have ended, and the current one, which is entered again.
        """
        self._log = log
        self._ended = begun.stages_run
        self._entered = begun.stage - 1 if begun.stage >= 0 else -1
        self._open: _OpenStage | None = None

    def enter(self, plan: Plan, current: int, now_s: float, finished: set[str]) -> None:
        """Note that a stage is current; those before it that nobody entered have passed.

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
        """Note that the current stage has ended, if there is one."""
        if self._open is None:
            return
        ended, self._open = self._open, None
        nodes = tuple(sorted(finished - ended.finished_before))
        record = StageRecord(self._ended, ended.started_s, now_s, nodes)
        self._ended += 1
        self._log.after_stage(ended.stage, record)

    def begin_plan(self, now_s: float, finished: set[str]) -> None:
        """Note that another plan holds from now on."""
        self.end(now_s, finished)
        self._entered = -1
