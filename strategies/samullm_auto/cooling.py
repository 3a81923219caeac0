"""Annealing from a start until a moment, in several chains side by side."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import numpy as np

from samullm_auto.annealing import anneal
from samullm_auto.rehearsal import Encoded, Tables
from samullm_plugin.model.types import Floats, Ints

HEATS = (0.04, 0.004)
"""Heat of each chain at its begin, as a share of the start's value: how much worse a recipe may be
that is accepted with probability 1/e. It falls to 0."""

ROUNDS, ROUND_S = 4, 0.1
"""How often all chains begin anew, from the best recipe of all, at most; seconds of a round, at
least."""

CHUNK_S = 0.02
"""Seconds of annealing between two looks at the clock, about."""


class Chain:
    """One line of recipes, each a neighbour of the one before.

    Attributes:
        columns: the best recipes so far, of different values: by recipe and node, the six columns
            of an encoded recipe (flags in the first row).
        value_s: their values; inf where there is none.
        judged: recipes rehearsed.
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
            least_s: by scenario, the value of a good recipe.
            count: recipes to keep at most.
            rng: randomness.
        """
        self.columns = np.zeros((count, len(weights), 7))
        self.value_s = np.full(count, np.inf)
        self.judged = 0
        self._tables, self._hot, self._moments, self._rng = tables, hot, moments, rng
        self._least_s = least_s.copy()
        self._cumulative = np.cumsum(weights) / np.sum(weights)

    def run(self, start: Encoded, value_s: float, until_s: float, most: int) -> None:
        """Go from hot to cold.

        Args:
            start: where to begin.
            value_s: its value.
            until_s: when to stop, on the clock of ``time.monotonic``.
            most: recipes to judge at most.
        """
        current, trial = _copy(start), _copy(start)
        hot_s, begin_s, before, steps = self._hot * value_s, monotonic(), self.judged, 20
        while (now_s := monotonic()) < until_s and self.judged - before < most:
            past = (now_s - begin_s) / max(until_s - begin_s, 1e-9)
            past = max(past, (self.judged - before) / most)
            heat = max(hot_s * (1.0 - past) ** 2, 1e-9)
            value_s = anneal(self._tables, current, value_s, trial, self._cumulative,
                             self._moments, heat, steps, self.columns, self.value_s,
                             self._least_s, self._rng)  # fmt: skip
            self.judged += steps
            took_s = monotonic() - now_s
            steps = max(10, min(10_000, int(steps * CHUNK_S / max(took_s, 1e-6))))

    def best(self) -> tuple[float, Encoded]:
        """Return the best recipe and its value (inf: there is none)."""
        at = int(np.argmin(self.value_s))
        return float(self.value_s[at]), _encoded(self.columns[at])


def cool(
    tables: Tables,
    start: Encoded,
    value_s: float,
    least_s: Floats,
    weights: Floats,
    moments: Floats,
    until_s: float,
    most: int,
    count: int,
    rng: np.random.Generator,
) -> list[Chain]:
    """Return chains that have run.

    Args:
        tables: the problem.
        start: the recipe all chains begin with.
        value_s: its value.
        least_s: its value by scenario.
        weights: how likely each node is changed.
        moments: shares at which something may change.
        until_s: when to stop, on the clock of ``time.monotonic``.
        most: recipes to judge at most, in all.
        count: recipes to keep at most, in each chain.
        rng: randomness.
    """
    chains = [
        Chain(tables, hot, weights, moments, least_s, count, stream)
        for hot, stream in zip(HEATS, rng.spawn(len(HEATS)), strict=True)
    ]
    beside = min(len(chains), len(os.sched_getaffinity(0)))
    rounds = max(1, min(ROUNDS, int((until_s - monotonic()) / ROUND_S)))
    turns = rounds * -(-len(chains) // beside)
    share = max(1, most // (rounds * len(chains)))
    with ThreadPoolExecutor(beside) as pool:
        for _ in range(rounds):
            for first in range(0, len(chains), beside):
                now_s = monotonic()
                stop_s = now_s + (until_s - now_s) / turns
                turns -= 1
                running = [
                    pool.submit(chain.run, start, value_s, stop_s, share)
                    for chain in chains[first : first + beside]
                ]
                for future in running:
                    future.result()
            found_s, found = min((c.best() for c in chains), key=lambda pair: pair[0])
            if found_s < value_s:
                value_s, start = found_s, found
    return chains


def _copy(recipe: Encoded) -> Encoded:
    """Return a recipe that may be written to."""
    return recipe._replace(**{name: column.copy() for name, column in recipe._asdict().items()})


def _encoded(columns: Floats) -> Encoded:
    """Return a kept recipe in arrays."""

    def whole(column: Floats) -> Ints:
        return np.ascontiguousarray(column).astype(np.int64)

    start, split = columns[:, 2].copy(), columns[:, 3].copy()
    order, mode, then = (whole(columns[:, c]) for c in (0, 1, 4))
    return Encoded(order, mode, start, split, then, whole(columns[0, 5:7]))
