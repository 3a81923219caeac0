"""What observers of a run receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The run that is being watched.

    Attributes:
        run_id: unique name of the run.
        application: name of the application.
        executor: name of the executor.
        directory: where the run keeps its files; None for a run that keeps none.
    """

    run_id: str
    application: str
    executor: str
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What one stage did.

    Attributes:
        index: position of the stage in the run, from 0.
        started_s: seconds since the run started.
        ended_s: seconds since the run started.
        finished_nodes: names of the nodes that finished in it.
    """

    index: int
    started_s: float
    ended_s: float
    finished_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One line of the run's journal.

    Attributes:
        time_s: seconds since the run started.
        kind: what happened, such as ``engine_started``.
        fields: what else the journal holds of it.
    """

    time_s: float
    kind: str
    fields: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
