"""Simulated annealing from a start, in several chains side by side.

Kirkpatrick, Gelatt and Vecchi (1983), in a given number of steps; the temperature ("heat") falls by
additive quadratic cooling (Martín and Sierra, 2009, "A comparison of cooling schedules for
simulated annealing").
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import numpy as np

from samullm_auto.decoder import EncodedSolution, Tables
from samullm_auto.neighbourhood import anneal
from samullm_plugin.model.types import Floats, Ints

HEATS = (0.04, 0.004)
"""Heat of each chain at its begin, as a share of the start's value: how much worse a solution may
be that is accepted with probability 1/e. It falls to 0."""

ROUNDS, ROUND_STEPS = 4, 1000
"""How often all chains begin anew, from the best solution of all, at most; solutions of a round, at
least."""

HEAT_STEPS = 50
"""Steps in which a chain cools."""


class Chain:
    """One line of solutions, each a neighbour of the one before.

    Attributes:
        columns: the best solutions so far, of different values: by solution and node, the columns
            of an encoded solution (flags in the first row).
        value_s: their values; inf where there is none.
        judged: solutions decoded.
    """

    def __init__(
        self,
        tables: Tables,
        hot: float,
        weights: Floats,
        moments: Floats,
        least_s: Floats,
        count: int,
        rng: np.random.Generator,
    ) -> None:
        """Prepare.

        Args:
            tables: the problem.
            hot: heat at the begin of a round, as a share of the value it begins with.
            weights: how likely each node is changed.
            moments: shares at which something may change.
            least_s: by scenario, the value of a good solution.
            count: solutions to keep at most.
            rng: randomness.
        """
        self.columns = np.zeros((count, len(weights), 7))
        self.value_s = np.full(count, np.inf)
        self.judged = 0
        self._tables, self._hot, self._moments, self._rng = tables, hot, moments, rng
        self._least_s = least_s.copy()
        self._cumulative = np.cumsum(weights) / np.sum(weights)

    def run(self, start: EncodedSolution, value_s: float, steps: int, fuse_s: float) -> None:
        """Go from hot to cold.

        Args:
            start: where to begin.
            value_s: its value.
            steps: solutions to judge.
            fuse_s: when to stop at the latest, on the clock of ``time.monotonic``.
        """
        current, trial = _copy(start), _copy(start)
        hot_s, done = self._hot * value_s, 0
        chunk = max(1, steps // HEAT_STEPS)
        while done < steps and monotonic() < fuse_s:
            heat = max(hot_s * (1.0 - done / steps) ** 2, 1e-9)
            value_s = anneal(self._tables, current, value_s, trial, self._cumulative,
                             self._moments, heat, chunk, self.columns, self.value_s,
                             self._least_s, self._rng)  # fmt: skip
            done += chunk
        self.judged += done

    def best(self) -> tuple[float, EncodedSolution]:
        """Return the best solution and its value (inf: there is none)."""
        at = int(np.argmin(self.value_s))
        return float(self.value_s[at]), encoded_columns(self.columns[at])


def annealing_chains(
    tables: Tables,
    start: EncodedSolution,
    value_s: float,
    least_s: Floats,
    weights: Floats,
    moments: Floats,
    steps: int,
    fuse_s: float,
    count: int,
    rng: np.random.Generator,
) -> list[Chain]:
    """Return chains that have run.

    Args:
        tables: the problem.
        start: the solution all chains begin with.
        value_s: its value.
        least_s: its value by scenario.
        weights: how likely each node is changed.
        moments: shares at which something may change.
        steps: solutions to judge, in all.
        fuse_s: when to stop at the latest, on the clock of ``time.monotonic``.
        count: solutions to keep at most, in each chain.
        rng: randomness.
    """
    chains = [
        Chain(tables, hot, weights, moments, least_s, count, stream)
        for hot, stream in zip(HEATS, rng.spawn(len(HEATS)), strict=True)
    ]
    rounds = max(1, min(ROUNDS, steps // ROUND_STEPS))
    share = max(1, steps // (rounds * len(chains)))
    with ThreadPoolExecutor(min(len(chains), len(os.sched_getaffinity(0)))) as pool:
        for _ in range(rounds):
            running = [pool.submit(c.run, start, value_s, share, fuse_s) for c in chains]
            for future in running:
                future.result()
            found_s, found = min((c.best() for c in chains), key=lambda pair: pair[0])
            if found_s < value_s:
                value_s, start = found_s, found
    return chains


def _copy(solution: EncodedSolution) -> EncodedSolution:
    """Return a solution that may be written to."""
    return solution._replace(**{name: column.copy() for name, column in solution._asdict().items()})


def encoded_columns(columns: Floats) -> EncodedSolution:
    """Return a kept solution in arrays."""

    def whole(column: Floats) -> Ints:
        return np.ascontiguousarray(column).astype(np.int64)

    start, split = columns[:, 2].copy(), columns[:, 3].copy()
    order, mode, then = (whole(columns[:, c]) for c in (0, 1, 4))
    return EncodedSolution(order, mode, start, split, then, whole(columns[0, 5:7]))
