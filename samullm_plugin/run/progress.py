"""How far a run is, from its events, and how long it may still take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.host.interfaces.observer import RunEvent
from samullm_plugin.model.application import Application
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.model.types import Floats
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.log import SETTLED
from samullm_plugin.run.user_nodes import UserNodes


@dataclass(slots=True)
class NodeProgress:
    """How far a node is.

    Attributes:
        name: its name.
        total: its requests.
        settled: those that are done with, failed and not taken ones included.
        failed: those that failed.
        tokens: tokens of finished outputs.
        tokens_before: those of them that finished before an interruption.
        began_s: when its first engine was ready; None before.
        last_s: when its last request was settled.
        engines: engines that serve or start.
    """

    name: str
    total: int
    settled: int = 0
    failed: int = 0
    tokens: int = 0
    tokens_before: int = 0
    began_s: float | None = None
    last_s: float = 0.0
    engines: int = 0

    def tokens_per_s(self, now_s: float) -> float | None:
        """Return output tokens per second since its first engine was ready."""
        tokens = self.tokens - self.tokens_before
        if self.began_s is None or tokens == 0:
            return None
        until_s = self.last_s if self.settled == self.total else now_s
        return tokens / max(until_s - self.began_s, 1e-9)


class RunProgress:
    """Follows a run.

    Attributes:
        nodes: as their user wrote them, in the plan's order.
        stage: number of the current stage over all plans, from 1; 0 before the first.
        now_s: time of the last event.
        replans: plans adopted after the first.
    """

    def __init__(self, app: Application, traces: Sequence[PlanTrace]) -> None:
        """Begin before the run.

        Args:
            app: the application.
            traces: the plan's simulations, one per length scenario.
        """
        users = UserNodes(app)
        self._parts = list(users.parts.values())
        self.nodes = [NodeProgress(name, len(part)) for name, _, part in users]
        self.stage, self.now_s, self.replans = 0, 0.0, -1
        self._by_name = {n.name: n for n in self.nodes}
        self._served = {n.name: [self._by_name[p.name] for p in n.parts] for n in app.nodes}
        self._finish: list[Floats] = []
        self._clock: Callable[[], float] | None = None
        self.expect(traces)

    def expect(self, traces: Sequence[PlanTrace]) -> None:
        """Take the remaining time from these simulations of the run's first plan."""
        mine = [(i, part.rows) for i, part in self._parts]
        ends = ([t.finish_s[i][rows] for i, rows in mine] for t in traces)
        self._finish = [np.sort(np.concatenate(e)) for e in ends]

    def take_up(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        """Count what was settled before an interruption.

        Args:
            ledger: of the run.
            clock: tells the run's time also between events.
        """
        self._clock = clock
        self.now_s = max(self.now_s, clock())
        for node, (i, part) in zip(self.nodes, self._parts, strict=True):
            status, generated = ledger.status[i][part.rows], ledger.generated[i][part.rows]
            node.settled = int((status >= Status.FINISHED).sum())
            node.failed = int((status == Status.FAILED).sum())
            node.tokens_before = node.tokens = int(generated[status == Status.FINISHED].sum())

    def take(self, event: RunEvent) -> None:
        """Follow an event."""
        self.now_s = max(self.now_s, event.time_s)
        if event.kind == "stage":
            self.stage = int(str(event.fields["number"])) + 1
        elif event.kind == "plan":
            self.replans += 1
        name = str(event.fields.get("node"))
        if event.kind in SETTLED:
            node = self._by_name[name]
            node.settled += 1
            node.failed += event.kind == "failed"
            node.tokens += int(str(event.fields.get("num_tokens", 0)))
            node.last_s = event.time_s
        for node in self._served.get(name, ()):  # all that the engine serves
            if event.kind == "engine_started":
                node.engines += 1
            elif event.kind == "engine_stopped":
                node.engines -= 1
            elif event.kind == "engine_ready" and node.began_s is None:
                node.began_s = event.time_s

    @property
    def settled(self) -> int:
        """Return the settled requests of all nodes."""
        return sum(n.settled for n in self.nodes)

    @property
    def total(self) -> int:
        """Return the requests of all nodes."""
        return sum(n.total for n in self.nodes)

    def remaining_s(self) -> tuple[float, float] | None:
        """Return the least and the most seconds left, over the planned length scenarios.

        The plan's simulations say when as many requests were to be settled as are now; what they
        had left then is stretched by how much later (or earlier) than planned that is. Before the
        first request has finished, all is taken to go as planned.
        """
        done = self.settled
        if not self._finish:
            return None
        found = []
        for finish in self._finish:
            at_s = float(finish[min(done, len(finish)) - 1]) if done else self.now_s
            stretch = self.now_s / at_s if at_s > 0 else 1.0
            found.append(max(0.0, float(finish[-1]) - at_s) * stretch)
        since_s = 0.0 if self._clock is None else max(0.0, self._clock() - self.now_s)
        return max(0.0, min(found) - since_s), max(0.0, max(found) - since_s)
