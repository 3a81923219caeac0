"""Solutions improved by simulated annealing on their decodings, compiled, in several chains.

Kirkpatrick, Gelatt and Vecchi (1983), in a given number of steps; the temperature ("heat") falls by
additive quadratic cooling (Martín and Sierra, 2009, "A comparison of cooling schedules for
simulated annealing").
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, perf_counter

import numpy as np

from samullm_auto.decoder import (
    NEVER,
    EncodedSolution,
    Tables,
    compiled,
    inner_value_s,
    value_s,
)
from samullm_plugin.engine.ahead import loop_compiled_beside
from samullm_plugin.engine.jit import inner
from samullm_plugin.model.types import Floats, Ints

logger = logging.getLogger(__name__)

ALIKE = 1e-3
"""Share by which the values of solutions that are kept differ at least: most that are closer are
the same plan but for details which decide nothing."""


@inner
def _pick(weights, rng):  # type: ignore[no-untyped-def]  # typed by numba from its arguments
    """Return an index at random, by cumulative weights that end at 1."""
    at = rng.random()
    for i in range(len(weights)):
        if at < weights[i]:
            return i
    return len(weights) - 1


@inner
def _below(rng, bound):  # type: ignore[no-untyped-def]  # as above
    """Return a number at random."""
    return rng.integers(0, bound)


@inner
def move(t, solution, weights, moments, rng):  # type: ignore[no-untyped-def]  # as above
    """Change a solution at random, in place."""
    order, mode, start, split, then, flags = solution
    count = len(order)
    kind = rng.random()
    node = _pick(weights, rng)
    options = t.first[node + 1] - t.first[node]
    if kind < 0.15:
        if t.up_first[node + 1] == t.up_first[node]:
            kind = 0.3  # it waits for nobody
        else:
            choice = _below(rng, len(moments) + 2)
            start[node] = 0.0 if choice == 0 else 1.0
            if 0 < choice <= len(moments):
                start[node] = moments[choice - 1]
            return
    if kind < 0.4:
        if split[node] > 0.0 and rng.random() < 0.5:
            split[node] = 0.0
        else:
            split[node] = moments[_below(rng, len(moments))]
            then[node] = t.first[node] + _below(rng, options)
    elif kind < 0.65 or count == 1:
        mode[node] = t.first[node] + _below(rng, options)
    elif kind < 0.77:
        a, b = _below(rng, count), _below(rng, count)
        order[a], order[b] = order[b], order[a]
    elif kind < 0.86:
        a, b = _below(rng, count), _below(rng, count)
        moved = order[a]
        while a < b:
            order[a] = order[a + 1]
            a += 1
        while a > b:
            order[a] = order[a - 1]
            a -= 1
        order[b] = moved
    elif kind < 0.94:
        mode[node] = t.first[node] + _below(rng, options)
        other = _pick(weights, rng)
        mode[other] = t.first[other] + _below(rng, t.first[other + 1] - t.first[other])
    elif kind > 0.98 and t.engines[mode[node]] >= 0:
        flags[2] = 1 - flags[2]
    else:
        which = _below(rng, 3)
        if which != 1:
            flags[0] = 1 - flags[0]
        if which != 0:
            flags[1] = 1 - flags[1]


@inner
def _copy(source, target):  # type: ignore[no-untyped-def]  # as above
    """Write one solution into another."""
    for i in range(len(source.order)):
        target.order[i], target.mode[i] = source.order[i], source.mode[i]
        target.start[i], target.split[i] = source.start[i], source.split[i]
        target.then[i] = source.then[i]
    for i in range(len(source.flags)):
        target.flags[i] = source.flags[i]


@compiled
def anneal(  # type: ignore[no-untyped-def]  # as above
    t, current, value, trial, weights, moments, heat, steps, kept, kept_s, least_s, rng
):
    """Go on with annealing for some steps; return the value of ``current`` after it.

    Args:
        t: the problem.
        current: where it stands, changed in place.
        value: of ``current``.
        trial: a solution to write into.
        weights: cumulative weights of the nodes.
        moments: shares at which something may change.
        heat: difference that is accepted with probability 1/e.
        steps: solutions to decode.
        kept: the best solutions so far, of different values, changed in place: by solution and
            node, the columns of an encoded solution (flags in the first row of the last three).
        kept_s: their values.
        least_s: by scenario, the least value known; changed in place.
        rng: randomness.
    """
    for _ in range(steps):
        _copy(current, trial)
        move(t, trial, weights, moments, rng)
        accepted = value - heat * np.log(1.0 - rng.random())  # drawn first: the rest is given up
        judged = inner_value_s(t, trial, accepted, least_s)
        if judged > accepted:
            continue
        _copy(trial, current)
        value = judged
        at, near = 0, False
        for k in range(len(kept_s)):
            if abs(kept_s[k] - judged) < ALIKE * judged:
                at, near = k, True
            elif not near and kept_s[k] > kept_s[at]:
                at = k
        if judged < kept_s[at]:
            kept_s[at] = judged
            for i in range(len(trial.order)):
                kept[at, i, 0], kept[at, i, 1] = trial.order[i], trial.mode[i]
                kept[at, i, 2], kept[at, i, 3] = trial.start[i], trial.split[i]
                kept[at, i, 4] = trial.then[i]
            for i in range(len(trial.flags)):
                kept[at, 0, 5 + i] = trial.flags[i]
    return value


def compile_ahead() -> None:
    """Have all of it compiled, or read from the cache of an earlier process.

    Compiling takes seconds, once per installation, that are not to count as seconds of searching.
    The simulator, which the search needs as well, is compiled beside it.
    """
    if compiled.has(anneal):
        _compile()
        return
    logger.warning(
        "compiling the planner's search and the simulator (once per version, half a minute); "
        "kept in %s",
        compiled.folder,
    )
    started = perf_counter()
    with loop_compiled_beside():
        _compile()
    logger.warning("compiled in %.1f s", perf_counter() - started)


def _compile() -> None:
    one = np.array([1], np.int64)
    none = np.zeros(0, np.int64)
    tables = Tables(
        first=np.array([0, 1], np.int64),
        devices=one,
        width=one,
        parts=one,
        wider=-one,
        engines=-one,
        allowed=np.ones((1, 1), np.bool_),
        size=one,
        kind=np.zeros(1, np.int64),
        load_s=np.zeros((1, 1)),
        work_s=np.array([[[0.0, 1.0]]]),
        shares=np.array([0.0, 1.0]),
        up_first=np.zeros(2, np.int64),
        up=none,
        tail_first=np.zeros(1, np.int64),
        tail_s=np.zeros(0),
        topological=np.zeros(1, np.int64),
    )
    zero = np.zeros(1, np.int64)
    solution = EncodedSolution(zero, zero, np.zeros(1), np.zeros(1), zero, np.zeros(3, np.int64))
    rng, ones = np.random.default_rng(0), np.ones(1)
    least_s = np.full(1, np.inf)
    value = float(value_s(tables, solution, NEVER, np.zeros(1)))
    kept, kept_s = np.zeros((1, 1, 8)), np.full(1, np.inf)
    anneal(tables, solution, value, solution, ones, ones, 1.0, 1, kept, kept_s, least_s, rng)


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
        self.columns = np.zeros((count, len(weights), 8))
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
        current, trial = _copied(start), _copied(start)
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


def _copied(solution: EncodedSolution) -> EncodedSolution:
    """Return a solution that may be written to."""
    return solution._replace(**{name: column.copy() for name, column in solution._asdict().items()})


def encoded_columns(columns: Floats) -> EncodedSolution:
    """Return a kept solution in arrays."""

    def whole(column: Floats) -> Ints:
        return np.ascontiguousarray(column).astype(np.int64)

    start, split = columns[:, 2].copy(), columns[:, 3].copy()
    order, mode, then = (whole(columns[:, c]) for c in (0, 1, 4))
    return EncodedSolution(order, mode, start, split, then, whole(columns[0, 5:8]))
