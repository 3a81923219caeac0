"""What a run begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from samullm_plugin.host.interfaces.executor import RequestOutput
from samullm_plugin.run.ledger import Ledger, RequestId


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Limits of a run.

    Attributes:
        max_engine_failures: after so many failures of a node's engines in a row, none of its
            requests having finished in between, the node is given up.
        max_request_failures: a request is given up after so many engines died under it.
    """

    max_engine_failures: int = 3
    max_request_failures: int = 3


@dataclass(slots=True)
class Begun:
    """Where a run takes up: at its beginning, or where an interrupted one was.

    Attributes:
        ledger: what is settled.
        moved: tokens that unfinished requests have generated, with their prompts.
        clock_s: the run's clock.
        stage: index of the current stage of the plan; -1 before the first.
        finished_before: nodes that had finished when that stage began.
        stages_run: stages that have ended, over all plans.
    """

    ledger: Ledger
    moved: Mapping[RequestId, RequestOutput] = field(default_factory=dict)
    clock_s: float = 0.0
    stage: int = -1
    finished_before: frozenset[str] = frozenset()
    stages_run: int = 0
