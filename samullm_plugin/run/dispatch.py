"""Engines of one model and which of its requests goes to which of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from samullm_plugin.host.interfaces.executor import EngineRequest
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
        ready_s: when it could serve; None while it starts.
        outstanding: requests it has, by index.
        num_finished: requests it finished.
        busy_s: seconds in which it had requests, until ``busy_since_s``.
        busy_since_s: when it got the first of the requests it has; None without any.
    """

    key: str
    devices: tuple[int, ...]
    started_s: float
    planned_s: float
    ready_s: float | None = None
    outstanding: dict[int, EngineRequest] = field(default_factory=dict)
    num_finished: int = 0
    busy_s: float = 0.0
    busy_since_s: float | None = None

    def note_busy(self, now_s: float) -> None:
        """Bring the account of busy seconds up to now."""
        if self.busy_since_s is not None:
            self.busy_s += now_s - self.busy_since_s
        self.busy_since_s = now_s if self.outstanding else None


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

    def place(self, request: int) -> Replica:
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

    def priority(self, request: int) -> int:
        """Return the priority of a request; the lower number first."""
        return 0 if self.assigned is None else self.assigned[request][0]

    def drop(self, replica: Replica) -> None:
        """Forget a replica that has failed; its chains go elsewhere."""
        self.replicas.remove(replica)
        self._chain_at = {c: r for c, r in self._chain_at.items() if r is not replica}

    def outstanding(self) -> Iterator[tuple[Replica, int]]:
        """Yield the requests its engines have."""
        for replica in self.replicas:
            for request in replica.outstanding:
                yield replica, request
