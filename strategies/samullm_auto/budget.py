"""How much may be searched, counted in work and not in seconds.

Work is what decides when to stop, so that a seed gives the same plan on a busy machine as on an
idle one. It is given in *reference seconds*: about what it takes on an idle two-core machine, by
the rates below. They are round figures from profiles of planning and decide when searching stops,
nothing else. The clock is only a fuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from samullm_plugin import ParallelConfig, Problem

REQUEST_S, REPLICA_S, NODE_S = 1.5e-6, 1.5e-4, 4e-4
"""Reference seconds of simulating a request, a replica, and a node of a plan."""

DECODE_S, DECODE_NODE_S = 4e-6, 6e-8
"""Reference seconds of decoding a solution, in all, and per pair of nodes."""

PATIENCE, PATIENCE_S = 0.001, (0.1, 3.0)
"""Share of the makespan that a round of searching may take, and limits to that."""


class Budget:
    """The work that may be spent.

    Attributes:
        economical: it stops where searching on is likely to cost more than it saves.
        spent_s: reference seconds spent.
        blown: the fuse ended the search.
        fuse_s: when to stop at the latest, on the clock of ``time.monotonic``.
    """

    def __init__(self, allowance_s: float, fuse_s: float, *, economical: bool) -> None:
        """Begin to spend.

        Args:
            allowance_s: reference seconds.
            fuse_s: when to stop at the latest, on the clock of ``time.monotonic``.
            economical: see above.
        """
        self.economical, self.spent_s, self.blown = economical, 0.0, False
        self._allowance_s, self.fuse_s = allowance_s, fuse_s

    @property
    def left_s(self) -> float:
        """Return the reference seconds left to spend, 0 once the fuse has blown."""
        self.blown = self.blown or monotonic() > self.fuse_s
        return 0.0 if self.blown else max(0.0, self._allowance_s - self.spent_s)

    def spend(self, work_s: float) -> None:
        """Count work."""
        self.spent_s += work_s

    def earn(self, saved_s: float) -> None:
        """Let half of what a better plan saves be spent on searching on."""
        if self.economical:
            self._allowance_s += 0.5 * saved_s

    def round_s(self, value_s: float) -> float:
        """Return the reference seconds of a round of searching."""
        low, high = PATIENCE_S
        return min(0.5 * self.left_s, 1.5 * min(max(PATIENCE * value_s, low), high))


class Costs:
    """Reference seconds of what a search does.

    Attributes:
        plan_s: simulating a whole plan in one length scenario.
        decode_s: decoding a solution in one length scenario.
    """

    def __init__(self, problem: Problem) -> None:
        """Look at the problem that is searched on."""
        nodes = len(problem.app.nodes)
        self._requests = [len(n.requests) for n in problem.app.nodes]
        self._upstreams = problem.app.upstreams
        self.plan_s = (
            REQUEST_S * sum(self._requests)
            + NODE_S * nodes
            + REPLICA_S * min(nodes, 4) * problem.cluster.num_gpus
        )
        self.decode_s = DECODE_S + DECODE_NODE_S * nodes**2

    def modes_s(self, node: int, configs: Sequence[ParallelConfig]) -> float:
        """Return the reference seconds of a node alone in each of these configurations."""
        replicas = sum(p.data_parallel_size for p in configs)
        return len(configs) * REQUEST_S * self._requests[node] + REPLICA_S * replicas

    def pairs_s(self, configs: Sequence[Sequence[ParallelConfig]]) -> float:
        """Return those of all consumers behind their producers, in these configurations of each."""
        return sum(
            len(configs[u]) * self.modes_s(i, configs[i])
            for i, upstreams in enumerate(self._upstreams)
            for u in upstreams
        )
