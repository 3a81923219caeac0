"""A lower bound on the simulated makespan of any plan whatsoever, for one length scenario.

Two arguments, both from the iteration latencies themselves:

* *Critical path*: what every request takes at least, alone, after its inputs
  (:mod:`samullm_plugin.rules.critical_path`). Requests of nodes that wait for no other finish where
  the node's simulation in some size has them, or a start later than alone; and nodes for which
  there are no devices wait for them (:mod:`samullm_plugin.rules.late_starts`).
* *Device seconds*: what all nodes cost must fit into makespan times devices
  (:mod:`samullm_plugin.rules.packing`). A node is done either *in one go*, by engines that are
  started once in one size and hold their devices to its end, or by engines that are started twice
  at least. Its iterations cost no less than its tokens at their prices
  (:mod:`samullm_plugin.rules.iteration_prices`), in one go what they cost in that size. A node that
  waits for no other takes in one go what its simulation takes, whenever it starts, and what waits
  for it comes after that.

Engines that sleep between two nodes are started once, as those that the second takes over at once.

A plan may mix parallel sizes within a node that is started more than once, so prices are each taken
at their cheapest size there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, replace

import numpy as np

from samullm_plugin.model.latency import StepLatency
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.rules.critical_path import Earliest, Paths, Window, alone_s, modes_of
from samullm_plugin.rules.iteration_prices import unit_prices, work_of
from samullm_plugin.rules.late_starts import Held, InSize, Simulated, late_starts_s
from samullm_plugin.rules.packing import Demand, InOneGo, fitting_s
from samullm_plugin.rules.transition import Running

Timed = Callable[[int, ParallelConfig, str], "Floats | None"]
"""When the requests of a node that waits for no other finish, counted from when its engines are
ready (0: not needed), given its index, their sizes and kind of GPU; None: not to be had."""


EVERY_SIZE = 60_000
"""Requests that are simulated in every size, at most (a choice)."""

SLIGHTLY = 1e-6
"""Share by which a bound is widened before it is asked what fits."""


@dataclass(frozen=True, slots=True)
class LowerBound:
    """The bound and its two parts.

    Attributes:
        value_s: the larger of the two.
        critical_path_s: by the longest chain of requests, and who waits for devices.
        device_s: by device seconds over devices.
    """

    value_s: float
    critical_path_s: float
    device_s: float


def lower_bound(
    problem: Problem,
    scenario: LengthScenario,
    running: Mapping[str, tuple[Running, float]] | None = None,
    timed: Timed | None = None,
    asleep: Collection[int] = (),
) -> LowerBound:
    """Return a bound that no simulated plan of the problem beats in this scenario.

    Args:
        problem: the instance.
        scenario: lengths.
        running: engines that run when plans begin, and in how many seconds they are ready: their
            nodes need no start, and those ready before 0 have done that much of their work.
        timed: simulates nodes alone; None: the bound holds for all request policies, else for that
            of these simulations.
        asleep: numbers of engines that sleep when plans begin: they are taken to need no start.
    """
    ahead = {
        problem.app.index(name): (max(0.0, -ready_s), len(engine.devices))
        for name, (engine, ready_s) in (running or {}).items()
    }
    engine_of = problem.engine_numbers
    numbers = {engine_of[i] for i in ahead} | set(asleep)  # of engines that are there
    started = {i for i, k in enumerate(engine_of) if k in numbers}
    done_s = {i: seconds for i, (seconds, _) in ahead.items()}
    paths = Paths(problem, scenario, done_s, started)
    alone = paths.earliest()
    simulated = {} if timed is None else _simulated(problem, paths, alone, started, timed)
    later_s = {i: s.later_s() for i, s in simulated.items()}
    earliest = paths.earliest(later_s)
    demands: list[Demand] = []
    ways: dict[int, _Ways] = {}  # by place among the demands
    shared: dict[int, int] = {}  # by number of engines, the place of all nodes that they serve
    held: dict[int, Held] = {}
    for i, node in enumerate(problem.app.nodes):
        demand, window = _demand(problem, scenario, i), paths.window(earliest, i)
        if demand is None:
            continue
        alike = i in started or node.name in problem.same_engine
        held[i] = Held(
            min(devices for devices, _, _ in modes_of(problem, i)),
            0.0 if alike else demand.start_s,
            0.0 if i in ahead else demand.work,
        )
        if i in ahead:
            seconds, devices = ahead[i]
            demand = Demand(max(0.0, demand.work - seconds * devices), 0.0, 0.0, 0.0)
        elif engine_of[i] in numbers:
            demand = Demand(demand.work, 0.0, 0.0, 0.0)  # engines that are there may serve it
        elif node.name in problem.same_engine:
            demand = demand.between(window.head_s, window.tail_s)
            if engine_of[i] in shared:
                at = shared[engine_of[i]]
                demands[at] = demands[at].joined(demand)
                continue
            shared[engine_of[i]] = len(demands)
        else:
            end_s = float(alone.finish_s[i].max()) if i in later_s else window.end_s
            ways[len(demands)] = _Ways(problem, scenario, i, window, end_s, paths, later_s)
            demand = ways[len(demands)].known(demand)
        demands.append(demand)
    gpus = problem.cluster.num_gpus
    path_s = late_starts_s(paths, held, gpus, simulated)
    device_s = fitting_s(demands, gpus)
    while timed is not None:
        by_s = max(device_s, path_s)
        news = [at for at, way in ways.items() if way.simulated(demands[at], by_s, timed)]
        if not news:
            break
        for at in news:
            demands[at] = ways[at].known(demands[at])
        device_s = fitting_s(demands, gpus, device_s)
    return LowerBound(max(device_s, path_s), path_s, device_s)


def _simulated(
    problem: Problem, paths: Paths, alone: Earliest, started: Container[int], timed: Timed
) -> dict[int, Simulated]:
    """Return nodes that wait for no other as they are simulated in all sizes.

    Not those whose engines may be those of other nodes, or run already.
    """
    found: dict[int, Simulated] = {}
    left = EVERY_SIZE
    windows = [paths.window(alone, i) for i in range(len(problem.app.nodes))]
    for i in sorted(range(len(windows)), key=lambda i: -(windows[i].end_s + windows[i].tail_s)):
        node = problem.app.nodes[i]
        if i in started or node.name in problem.same_engine or not paths.taken[i].any():
            continue
        if (node.requests.input_node != i).any():
            continue
        sizes = [(k, r) for k in problem.costs[i] for r in _counts(problem, i, k)]
        requests = len(sizes) * int(paths.taken[i].sum())
        if requests > left:
            continue
        left -= requests
        again_s = min(problem.least_start_s(costs) for _, costs, _ in modes_of(problem, i))
        runs: list[InSize] = []
        for key, replicas in sizes:
            run_s = timed(i, key.parallel(replicas), key.gpu)
            if run_s is None:
                break
            costs = problem.costs[i][key]
            ready_s, start_s = problem.first_ready_s(i, costs), problem.least_start_s(costs)
            runs.append(InSize(replicas * key.num_devices, start_s, ready_s, run_s))
        else:
            again = np.where(paths.taken[i], alone.finish_s[i] + again_s, 0.0)
            found[i] = Simulated(tuple(runs), again)
    return found


def _counts(problem: Problem, node: int, key: ModeKey) -> range:
    """Return the numbers of replicas of a shape that there are devices for."""
    most = problem.cluster.kinds.count(key.gpu) // key.num_devices
    return range(1, most + 1) if problem.fits(node, key) else range(0)


class _Ways:
    """Ways to do a node in one go: at first what they take at least, then as simulated."""

    def __init__(
        self,
        problem: Problem,
        scenario: LengthScenario,
        node: int,
        window: Window,
        alone_end_s: float,
        paths: Paths,
        later_s: Mapping[int, Floats],
    ) -> None:
        """Look at all sizes and numbers of replicas.

        Args:
            problem: the instance.
            scenario: lengths.
            node: index of the node.
            window: in which it can be at work.
            alone_end_s: its last request cannot finish before this, whatever its batches.
            paths: all requests.
            later_s: moments before which requests do not finish, see :meth:`Paths.earliest`.
        """
        self._node, self._window, self._alone_end_s = node, window, alone_end_s
        self._paths, self._later_s = paths, later_s
        # While a node waits for another it may be started again without losing time.
        self._waits = bool((problem.app.nodes[node].requests.input_node != node).any())
        self._least_start_s = min(problem.least_start_s(c) for _, c, _ in modes_of(problem, node))
        self._sizes: list[tuple[ModeKey, float, float]] = []
        sizes, counts, held_s = list[Ints](), list[Ints](), list[Floats]()
        for key, costs in problem.costs[node].items():
            replicas = _counts(problem, node, key)
            if not replicas:
                continue
            held = least_held(problem, scenario, node, key)
            counts.append(np.array(replicas))
            sizes.append(np.full(len(replicas), len(self._sizes)))
            held_s.append(held.seconds(counts[-1]))
            self._sizes.append((key, problem.first_ready_s(node, costs), held.start_s))
        self._size, self._replicas = np.concatenate(sizes), np.concatenate(counts)
        self._held_s = np.concatenate(held_s)
        per_replica = [key.num_devices for key, _, _ in self._sizes]
        self._devices = np.array(per_replica)[self._size] * self._replicas
        before_s = np.array([ready_s - start_s for _, ready_s, start_s in self._sizes])
        ends_s = np.maximum(before_s[self._size] + self._held_s, window.end_s)
        self._end_s = ends_s + window.tail_s
        self._looked_up: set[int] = set()

    def known(self, demand: Demand) -> Demand:
        """Return a node's demand with what is known of these ways."""
        window = self._window
        again_s = 0.0 if self._waits else self._least_start_s
        parted_s = max(window.end_s, self._alone_end_s + again_s) + window.tail_s
        demand = demand.between(window.head_s, window.tail_s)
        whole = InOneGo(self._devices, self._held_s.copy(), self._end_s.copy())
        # Between two starts no engine is ready for one start; the first one is not before this.
        ready_s = min(ready_s for _, ready_s, _ in self._sizes) + self._least_start_s
        return replace(demand, whole=whole, parted_end_s=parted_s, parted_head_s=ready_s)

    def simulated(self, demand: Demand, makespan_s: float, timed: Timed) -> bool:
        """Simulate what is cheapest for a makespan as far as is known; return whether any was.

        Args:
            demand: the node's.
            makespan_s: a lower bound by what is known.
            timed: simulates.
        """
        if self._waits:
            return False
        within_s = makespan_s * (1 + SLIGHTLY)
        in_time, news = self._end_s <= within_s, False
        for edge_s in (0.0, demand.start_s):
            costs_s = np.where(in_time, self._devices * (self._held_s - edge_s), np.inf)
            k = int(costs_s.argmin())
            if not in_time[k] or k in self._looked_up:
                continue
            if demand.parted(within_s, edge_s) <= costs_s[k]:
                continue
            self._looked_up.add(k)
            key, ready_s, start_s = self._sizes[self._size[k]]
            run_s = timed(self._node, key.parallel(int(self._replicas[k])), key.gpu)
            if run_s is not None:
                news = True
                self._held_s[k] = max(start_s + float(run_s.max()), self._held_s[k])
                finish_s = np.where(self._paths.taken[self._node], ready_s + run_s, 0.0)
                earliest = self._paths.earliest({**self._later_s, self._node: finish_s})
                self._end_s[k] = max(earliest.end_s, self._end_s[k])
        return news


def _demand(problem: Problem, scenario: LengthScenario, node: int) -> Demand | None:
    """Return what the node certainly costs, or None if none of its requests is needed."""
    work = work_of(problem, scenario, node)
    modes = modes_of(problem, node)
    if work.requests == 0:
        return None
    # One choice of prices for all sizes; the cheapest size of each unit is what any mixture costs
    # at least.
    offers = [
        unit_prices(size, costs.latency, config)
        if isinstance(costs.latency, StepLatency)
        else None  # nothing is known of another model's least iteration
        for size, costs, config in modes
    ]
    known = [offer for offer in offers if offer is not None]
    best = work.least_s(known) if len(known) == len(offers) else 0.0
    one_start = min(size * problem.least_start_s(costs) for size, costs, _ in modes)
    return Demand(
        best,
        one_start,
        min(problem.least_start_s(costs) for _, costs, _ in modes),
        min(problem.first_ready_s(node, costs) for _, costs, _ in modes),
    )


@dataclass(frozen=True, slots=True)
class LeastHeld:
    """What a node takes at least that runs once, in one size, whenever its inputs come.

    Attributes:
        start_s: seconds of an engine start.
        shared_s: seconds of the iterations of all replicas: its tokens at the best batch.
        longest_s: seconds of its longest request alone.
    """

    start_s: float
    shared_s: float = 0.0
    longest_s: float = 0.0

    def seconds(self, replicas: Ints) -> Floats:
        """Return how long so many replicas hold their devices at least, sharing evenly."""
        return self.start_s + np.maximum(self.shared_s / replicas, self.longest_s)


def least_held(problem: Problem, scenario: LengthScenario, node: int, key: ModeKey) -> LeastHeld:
    """Return what a node takes at least with replicas of a shape on a kind of GPU."""
    costs = problem.costs[node][key]
    start_s, work = problem.least_start_s(costs), work_of(problem, scenario, node)
    if work.requests == 0 or not isinstance(costs.latency, StepLatency):
        return LeastHeld(start_s)
    config = problem.engine_config(node, costs)
    shared_s = work.least_s([unit_prices(1, costs.latency, config)])
    taken = scenario.output_tokens[node] > 0
    alone = alone_s(scenario, node, costs.latency, config)[taken]
    return LeastHeld(start_s, shared_s, float(alone.max()))
