"""How long simulating takes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from samullm_plugin import ParallelConfig, Problem
from samullm_plugin.simulator import PlanSimulator

REPLICA_S = 1.5e-4
"""Seconds that simulating a replica takes at least."""


class Pace:
    """About how long simulating takes in one length scenario.

    Attributes:
        plan_s: seconds of a whole plan.
    """

    def __init__(self, problem: Problem, simulator: PlanSimulator) -> None:
        """Simulate every model in its smallest configuration."""
        self._configs = [problem.parallel_configs(i) for i in range(len(problem.app.nodes))]
        self._upstreams = problem.app.upstreams
        began_s = monotonic()
        simulator.alone_many_s(0, [(i, c[0]) for i, c in enumerate(self._configs)])
        self.plan_s = max(monotonic() - began_s, 1e-4)
        self._tokens = [float(t.sum()) for t in problem.scenarios[0].output_tokens]
        self._token_s = self.plan_s / max(1.0, sum(self._tokens))

    def modes_s(self, node: int, configs: Sequence[ParallelConfig]) -> float:
        """Return seconds of a node alone in each of these configurations."""
        replicas = sum(p.data_parallel_size for p in configs)
        return len(configs) * self._token_s * self._tokens[node] + REPLICA_S * replicas

    def pairs_s(self, configs: Sequence[Sequence[ParallelConfig]]) -> float:
        """Return seconds of all consumers behind their producers, each in every configuration."""
        return sum(
            len(configs[u]) * self.modes_s(i, configs[i])
            for i, upstreams in enumerate(self._upstreams)
            for u in upstreams
        )
