"""A fast stand-in for the simulation: models timed alone, put together by decodings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from samullm_tasks.timing import TimedMode, alone, tails_s

from samullm_auto.decoder import NEVER, EncodedSolution, Tables, value_s
from samullm_auto.neighbourhood import ALIKE, annealing_chains, encoded_columns
from samullm_auto.solution import Solution, Split, by_shape
from samullm_plugin import Application, ParallelConfig, Problem
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.simulator import NodeRun, PlanSimulator

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Shares of a node's requests at which its progress is looked up; linear in between."""

MOMENTS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Shares of a node's requests at which something may change."""

TAIL = 0.02
"""Share of a consumer's time that it needs after its producer's end where that is not simulated."""


NUM_DURATIONS, DURATION_STEP = 40, 0.88
"""Durations tried for list schedules: the longest of all, and each next one shorter by a factor."""


class Surrogate:
    """Estimates makespans of solutions, and improves solutions by its estimate.

    A model that is resized goes on where the new configuration has finished the same share of the
    requests; a consumer that starts while its producer runs ends at the earliest its *tail* after
    it, which is simulated for both of them alone. Devices are given as the builder gives them.

    Attributes:
        judged: solutions decoded while annealing.
    """

    def __init__(
        self,
        problem: Problem,
        simulator: PlanSimulator,
        scenarios: Sequence[int],
        modes: Sequence[Sequence[TimedMode]],
        *,
        pairs: bool,
        full: int | None = None,
    ) -> None:
        """Time every model in every configuration.

        In scenarios in which only the smallest and the largest are timed, the others' seconds are
        those of the first scenario, scaled as much as these two's, by their devices in between.

        Args:
            problem: the instance.
            simulator: the host's simulator.
            scenarios: indices of the length scenarios to average over.
            modes: the configurations that solutions may name, by node, in the order of their
                number of devices.
            pairs: simulate what consumers need after their producers (in the first scenario).
            full: in how many of the scenarios, at least one, every configuration is timed; None: in
                all.
        """
        self.judged = 0
        self._problem, self._simulator, self._scenarios = problem, simulator, scenarios
        self._modes = [[m.parallel for m in of_node] for of_node in modes]
        self._first = np.cumsum([0, *(len(m) for m in modes)], dtype=np.int64)
        self._pairs = pairs
        self._timed = {(m.node, m.parallel): m for of_node in modes for m in of_node}
        full = len(scenarios) if full is None else full
        runs = [self._alone(s, self._modes) for s in scenarios[:full]]
        work_s = [np.array([_work_s(r) for r in of_scenario]) for of_scenario in runs]
        for s in scenarios[full:]:
            few = self._alone(s, [ends_of(of_node) for of_node in self._modes])
            work_s.append(self._scaled(work_s[0], [float(_work_s(r)[-1]) for r in few]))
        self.tables = self._tables(runs[0], np.array(work_s))

    def seconds(self, node: int, parallel: ParallelConfig) -> float:
        """Return the seconds of a node alone, engine start included, mean over the scenarios."""
        mode = self._mode(node, parallel)
        return float(np.mean(self.tables.load_s[:, mode] + self.tables.work_s[:, mode, -1]))

    def value_s(self, solution: Solution) -> float:
        """Return the estimated makespan, plus a little of the mean finish of all models."""
        return float(
            value_s(self.tables, self.encode(solution), NEVER, np.zeros(len(self._scenarios)))
        )

    def anneal(
        self,
        starts: Sequence[Solution],
        weights: Floats,
        steps: int,
        fuse_s: float,
        count: int,
        rng: np.random.Generator,
    ) -> list[Solution]:
        """Return solutions of different value that are good by the estimate, best first.

        Args:
            starts: where to start; the best of them is.
            weights: how likely each node is changed.
            steps: solutions to decode.
            fuse_s: when to stop at the latest, on the clock of ``time.monotonic``.
            count: solutions to return at most.
            rng: randomness.
        """
        values = {s: self.value_s(s) for s in starts}
        best = min(values, key=values.__getitem__)
        start = self.encode(best)
        least_s = np.full(len(self._scenarios), NEVER)
        value_s(self.tables, start, NEVER, least_s)
        moments = np.array(MOMENTS)
        chains = annealing_chains(
            self.tables, start, values[best], least_s, weights, moments, steps, fuse_s, count, rng
        )
        self.judged += sum(k.judged for k in chains)
        found = [
            (float(v), self.solution(encoded_columns(columns)))
            for k in chains
            for v, columns in zip(k.value_s, k.columns, strict=True)
            if v < np.inf
        ]
        found += [(v, s) for s, v in values.items()]
        ranked = sorted(found, key=lambda pair: pair[0])
        apart: list[tuple[float, Solution]] = []
        for value, solution in ranked:
            if not apart or value > apart[-1][0] * (1 + ALIKE):
                apart.append((value, solution))
        return list(dict.fromkeys(s for _, s in [*apart, *ranked]))[:count]

    def encode(self, solution: Solution) -> EncodedSolution:
        """Return a solution in arrays."""
        count = len(solution.order)
        mode = np.array([self._mode(i, p) for i, p in enumerate(solution.modes)], np.int64)
        split, then = np.zeros(count), mode.copy()
        for s in solution.splits:
            split[s.node], then[s.node] = s.fraction, self._mode(s.node, s.parallel)
        flags = np.array([solution.strict, solution.grow, solution.patient], np.int64)
        order = np.array(solution.order, np.int64)
        return EncodedSolution(order, mode, np.array(solution.starts, float), split, then, flags)

    def solution(self, encoded: EncodedSolution) -> Solution:
        """Return the solution in arrays as it was."""
        order, mode, start, split, then, flags = encoded
        nodes = range(len(order))
        splits = tuple(
            Split(i, float(split[i]), self._parallel(i, int(then[i])))
            for i in nodes
            if split[i] > 0 and then[i] != mode[i]
        )
        modes = tuple(self._parallel(i, int(mode[i])) for i in nodes)
        ranked = tuple(int(i) for i in order)
        starts = tuple(float(x) for x in start)
        return Solution(ranked, modes, starts, splits, *(bool(f) for f in flags))

    def _parallel(self, node: int, mode: int) -> ParallelConfig:
        return self._modes[node][mode - int(self._first[node])]

    def _mode(self, node: int, parallel: ParallelConfig) -> int:
        """Return the index of a configuration, or of the one of its size that is offered."""
        mine = self._modes[node]
        if parallel in mine:
            return int(self._first[node]) + mine.index(parallel)
        near = min(
            range(len(mine)),
            key=lambda k: (
                mine[k].devices_per_replica != parallel.devices_per_replica,
                abs(mine[k].num_devices - parallel.num_devices),
            ),
        )
        return int(self._first[node]) + near

    def _alone(self, scenario: int, modes: Sequence[Sequence[ParallelConfig]]) -> Sequence[NodeRun]:
        """Return the runs of these modes of every node."""
        asked = [(i, p) for i, of_node in enumerate(modes) for p in of_node]
        return alone(self._simulator, scenario, [self._timed[key] for key in asked])

    def _scaled(self, work_s: Floats, few_s: Sequence[float]) -> Floats:
        """Return seconds of work by mode and share where only few modes were timed.

        Args:
            work_s: in another scenario, in which all were.
            few_s: seconds of the smallest and the largest mode of each node.
        """
        timed, found = iter(few_s), []
        for i, of_node in enumerate(self._modes):
            mine = work_s[self._first[i] : self._first[i + 1]]
            at = [of_node.index(p) for p in ends_of(of_node)]
            ratios = [next(timed) / max(float(mine[k, -1]), 1e-9) for k in at]
            size = np.log([p.num_devices for p in of_node])
            found.append(mine * np.interp(size, size[at], ratios)[:, None])
        return np.concatenate(found)

    def _tables(self, first: Sequence[NodeRun], work_s: Floats) -> Tables:
        app, cluster = self._problem.app, self._problem.cluster
        modes = [(i, p) for i, of_node in enumerate(self._modes) for p in of_node]
        wider = np.full(len(modes), -1, np.int64)
        for i, of_node in enumerate(self._modes):
            for shape in by_shape(of_node):
                for a, b in pairwise(shape):
                    wider[self._mode(i, a)] = self._mode(i, b)
        groups = [(g, cluster.kinds[g[0]]) for g in cluster.nvlink_groups]
        kinds = list(dict.fromkeys(name for _, name in groups))
        keys = [[self._problem.mode_key(p, (g[0],)) for g, _ in groups] for _, p in modes]
        allowed = [
            [self._problem.fits(i, key) for key in of_mode]
            for (i, _), of_mode in zip(modes, keys, strict=True)
        ]
        ups = [sorted(up) for up in app.upstreams]
        tails = [self._tails(u, i, first) for i, up in enumerate(ups) for u in up]
        load_s = [self._timed[key].load_s for key in modes]
        return Tables(
            first=self._first,
            devices=np.array([p.num_devices for _, p in modes], np.int64),
            width=np.array([p.tensor_parallel_size for _, p in modes], np.int64),
            parts=np.array([p.num_devices // p.tensor_parallel_size for _, p in modes], np.int64),
            wider=wider,
            engines=self._engines(modes),
            allowed=np.array(allowed, bool),
            size=np.array([len(g) for g, _ in groups], np.int64),
            kind=np.array([kinds.index(name) for _, name in groups], np.int64),
            load_s=np.tile(load_s, (len(work_s), 1)),
            work_s=work_s,
            shares=np.array(SHARES),
            up_first=np.cumsum([0, *(len(up) for up in ups)], dtype=np.int64),
            up=np.array([u for up in ups for u in up], np.int64),
            tail_first=np.cumsum([0, *(t.size for t in tails)], dtype=np.int64),
            tail_s=np.concatenate([np.zeros(0), *(t.ravel() for t in tails)]),
            topological=np.array(app.order, np.int64),
        )

    def _engines(self, modes: Sequence[tuple[int, ParallelConfig]]) -> Ints:
        """Return by mode the number of engines that may be passed on, or -1."""
        problem, numbers = self._problem, dict[tuple[int, ParallelConfig], int]()
        shared = [problem.same_engine.get(n.name) for n in problem.app.nodes]
        found = [
            -1 if (k := shared[i]) is None else numbers.setdefault((k, p), len(numbers))
            for i, p in modes
        ]
        return np.array(found, np.int64)

    def _tails(self, producer: int, consumer: int, runs: Sequence[NodeRun]) -> Floats:
        """Return what a consumer needs after its producer, by the modes of both."""
        mine, its = self._modes[producer], self._modes[consumer]
        alone_s = np.array([runs[self._mode(consumer, p)].end_s for p in its])
        if not self._pairs:
            return np.tile(TAIL * alone_s, (len(mine), 1))
        finish_s = [
            np.where(np.isfinite(run.finish_s), run.finish_s, 0.0)
            for run in (runs[self._mode(producer, p)] for p in mine)
        ]
        return tails_s(
            self._simulator,
            self._scenarios[0],
            [self._timed[producer, p] for p in mine],
            finish_s,
            [replace(self._timed[consumer, p], load_s=0.0) for p in its],
        )


def list_solutions(
    app: Application, modes: Sequence[Sequence[ParallelConfig]], surrogate: Surrogate
) -> list[Solution]:
    """Return list schedules, the best by the surrogate first.

    For each of several durations, every model gets the configuration of least device time that
    takes no longer (else its fastest); what has the longest way to the end comes first.

    Args:
        app: the application.
        modes: configurations to choose from, by node.
        surrogate: times them.
    """
    times = [[surrogate.seconds(i, p) for p in of_node] for i, of_node in enumerate(modes)]
    longest = max(max(of_node) for of_node in times)
    found: dict[Solution, float] = {}
    for step in range(NUM_DURATIONS):
        limit_s = longest * DURATION_STEP**step
        chosen = []
        for of_node, seconds in zip(modes, times, strict=True):
            able = [k for k, s in enumerate(seconds) if s <= limit_s]
            pick = (
                min(able, key=lambda k: seconds[k] * of_node[k].num_devices)
                if able
                else min(range(len(seconds)), key=seconds.__getitem__)
            )
            chosen.append(pick)
        to_end = [seconds[k] for seconds, k in zip(times, chosen, strict=True)]
        for i in reversed(app.order):
            after = [to_end[c] for c, up in enumerate(app.upstreams) if i in up]
            to_end[i] += max(after, default=0.0)
        order = tuple(sorted(range(len(modes)), key=lambda i: -to_end[i]))
        picked = tuple(of_node[k] for of_node, k in zip(modes, chosen, strict=True))
        for start in {0.0, 1.0} if any(app.upstreams) else {0.0}:
            starts = tuple(start if up else 0.0 for up in app.upstreams)
            solution = Solution(order, picked, starts)
            found.setdefault(solution, surrogate.value_s(solution))
    return sorted(found, key=found.__getitem__)


def ends_of(modes: Sequence[ParallelConfig]) -> Sequence[ParallelConfig]:
    """Return the smallest and the largest of a node's modes, in the order of their devices."""
    return (modes[0], modes[-1]) if len(modes) > 1 else modes


def _work_s(run: NodeRun) -> Floats:
    """Return the seconds of work in which each of ``SHARES`` of a run's requests is finished."""
    finish = np.where(np.isfinite(run.finish_s), run.finish_s - run.ready_s, 0.0)
    ordered = np.sort(np.maximum(finish, 0.0))
    ranks = np.ceil(np.array(SHARES) * len(ordered) - 1e-9).astype(int)
    return np.where(ranks > 0, ordered[np.maximum(ranks, 1) - 1], 0.0)
