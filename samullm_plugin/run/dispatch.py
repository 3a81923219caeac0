"""Engines of one model and which of its requests goes to which of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from samullm_plugin.host.interfaces.backlog import Backlog
from samullm_plugin.host.interfaces.executor import REFILL, EngineRequest
from samullm_plugin.rules.transition import Running
from samullm_plugin.simulator.requests import NodeInputs


@dataclass(slots=True, eq=False)
class Replica:
    """One engine.

    Attributes:
        key: its name in the run.
        devices: its devices.
        started_s: when its start began, on the run's clock.
        planned_s: when the plan's figures have it ready.
        window: how many requests it is given at a time, besides those that are to be served before
            others it has; None: all that were dealt to it.
        ready_s: when it could serve; None while it starts.
        outstanding: requests it has, by index.
        backlog: requests dealt to it that it has not been given.
        num_finished: requests it finished.
        busy_s: seconds in which it had requests, until ``busy_since_s``.
        busy_since_s: when it got the first of the requests it has; None without any.
        prepared: what it took to be ready was no whole start: a part was done, or begun, before it
            got its devices; or it slept; or it waited until others did.
        woken: it slept.
    """

    key: str
    devices: tuple[int, ...]
    started_s: float
    planned_s: float
    window: int | None = None
    ready_s: float | None = None
    outstanding: dict[int, EngineRequest] = field(default_factory=dict)
    backlog: Backlog[int] = field(default_factory=Backlog)
    num_finished: int = 0
    busy_s: float = 0.0
    busy_since_s: float | None = None
    prepared: bool = False
    woken: bool = False

    def note_busy(self, now_s: float) -> None:
        """Bring the account of busy seconds up to now."""
        if self.busy_since_s is not None:
            self.busy_s += now_s - self.busy_since_s
        self.busy_since_s = now_s if self.outstanding else None

    @property
    def room(self) -> int:
        """Return how many requests it is to be given now; room for a few is not filled at once."""
        if self.window is None:
            return len(self.backlog)
        room = self.window - len(self.outstanding)
        return room if room * REFILL >= self.window else 0

    def take_backlog(self) -> Iterator[tuple[int, int]]:
        """Take out what the engine is to be given now, each with its priority.

        The window holds more than an engine can run, so that its scheduler finds the same requests
        at the head of its queue as if it had them all. A request that is to be served before one
        the engine has is given to it even where there is no room.
        """
        for _ in range(min(self.room, len(self.backlog))):
            yield self.backlog.take()
        last: int | None = None
        while self.backlog:
            if last is None:
                last = max((r.priority for r in self.outstanding.values()), default=0)
            if self.backlog.first() >= last:
                return
            yield self.backlog.take()


@dataclass(slots=True, eq=False)
class Deployment:
    """The engines of one node.

    Requests are dealt to the replicas in turn in the order in which they can be served, which is
    the plan simulator's rule; requests that wait for one another stay on one replica. Until the
    first replica is ready nothing is dealt, so that the order of a node's table is kept.

    Attributes:
        node: index of the node.
        running: assignment, devices and stage, as the transition rule knows them.
        replicas: those that have not failed.
        started_s: when its start began.
        avoid: devices on which a replica has failed.
        assigned: by request, priority and replica (None: in turn), where a request policy decides.
    """

    node: int
    running: Running
    inputs: NodeInputs
    started_s: float
    replicas: list[Replica] = field(default_factory=list)
    avoid: set[int] = field(default_factory=set)
    assigned: dict[int, tuple[int, int | None]] | None = None
    _turn: int = 0
    _chain_at: dict[int, Replica] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Return whether any replica can serve."""
        return any(r.ready_s is not None for r in self.replicas)

    def deal(self, requests: Sequence[int]) -> None:
        """Put requests into the backlogs of the replicas whose turn it is."""
        if self.assigned is not None or self.inputs.has_chain:
            for r in requests:
                self._place(r).backlog.add(self._priority(r), r)
            return
        for k, replica in enumerate(self.replicas):
            first = (k - self._turn) % len(self.replicas)
            replica.backlog.add_all(requests[first :: len(self.replicas)])
        self._turn += len(requests)

    def _place(self, request: int) -> Replica:
        """Return the replica whose turn it is."""
        chain = int(self.inputs.chain[request])
        replica = self._chain_at.get(chain)
        if replica is None:
            turn = None if self.assigned is None else self.assigned[request][1]
            turn = self._turn if turn is None else turn
            replica = self.replicas[turn % len(self.replicas)]
            self._turn += 1
            if self.inputs.has_chain:
                self._chain_at[chain] = replica
        return replica

    def _priority(self, request: int) -> int:
        """Return the priority of a request; the lower number first."""
        return 0 if self.assigned is None else self.assigned[request][0]

    def drop(self, replica: Replica) -> None:
        """Forget a replica that has failed; its chains go elsewhere."""
        self.replicas.remove(replica)
        self._chain_at = {c: r for c, r in self._chain_at.items() if r is not replica}
