"""What may replace the plan of a run in progress."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samullm_plugin.model.plan import Plan

if TYPE_CHECKING:
    from samullm_plugin.run.coordinator import Coordinator


class Adjustments:
    """Looks at a run in progress and may replace its plan; this one never does."""

    def begin(self, coordinator: Coordinator) -> None:
        """Be told that the run begins."""

    def consider(self, coordinator: Coordinator, *, stage_changed: bool) -> Plan | None:
        """Return the plan to go on with, or None to keep the present one."""
        del coordinator, stage_changed
        return None

    def end(self) -> None:
        """Be told that the run is over, whatever became of it."""
