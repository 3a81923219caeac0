"""A lower bound on the simulated makespan of any plan whatsoever, for one length scenario.

Two arguments, both from the iteration latencies themselves:

* *Critical path*: what every request takes at least, alone, after its inputs
  (:mod:`samullm_plugin.rules.critical_path`).
* *Device seconds*: what all nodes cost must fit into makespan times devices
  (:mod:`samullm_plugin.rules.packing`). A node is done either *in one go*, by engines that are
  started once in one size and hold their devices to its end, or by engines that are started twice
  at least. Its iterations cost no less than its tokens at their prices
  (:mod:`samullm_plugin.rules.iteration_prices`), in one go what they cost in that size. A node that
  waits for no other takes in one go what its simulation takes, whenever it starts.

A plan may mix parallel sizes within a node that is started more than once, so prices are each taken
at their cheapest size there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from samullm_plugin.model.latency import StepLatency
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.rules.critical_path import Window, alone_s, modes_of, windows
from samullm_plugin.rules.iteration_prices import unit_prices, work_of
from samullm_plugin.rules.packing import Demand, InOneGo, fitting_s
from samullm_plugin.rules.transition import Running

Timed = Callable[[int, ParallelConfig, str], "float | None"]
"""What the engines of a node that waits for no other take from ready to its end, given its index,
their sizes and kind of GPU; None: not to be had."""


SLIGHTLY = 1e-6
"""Share by which a bound is widened before it is asked what fits."""


@dataclass(frozen=True, slots=True)
class LowerBound:
    """The bound and its two parts.

    Attributes:
        value_s: the larger of the two.
        critical_path_s: by the longest chain of requests.
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
) -> LowerBound:
    """Return a bound that no simulated plan of the problem beats in this scenario.

    Args:
        problem: the instance.
        scenario: lengths.
        running: engines that run when plans begin, and in how many seconds they are ready: their
            nodes need no start, and those ready before 0 have done that much of their work.
        timed: simulates nodes alone; None: the bound holds for all request policies, else for that
            of these simulations.
    """
    ahead = {
        problem.app.index(name): (max(0.0, -ready_s), len(engine.devices))
        for name, (engine, ready_s) in (running or {}).items()
    }
    engine_of = problem.engine_numbers
    numbers = {engine_of[i] for i in ahead}  # of engines that are there
    started = {i for i, k in enumerate(engine_of) if k in numbers}
    done_s = {i: seconds for i, (seconds, _) in ahead.items()}
    path_s, window = windows(problem, scenario, done_s, started)
    demands: list[Demand] = []
    ways: dict[int, _Ways] = {}  # by place among the demands
    shared: dict[int, int] = {}  # by number of engines, the place of all nodes that they serve
    for i in range(len(problem.app.nodes)):
        demand = _demand(problem, scenario, i)
        if demand is None:
            continue
        if i in ahead:
            seconds, devices = ahead[i]
            demand = Demand(max(0.0, demand.work - seconds * devices), 0.0, 0.0, 0.0)
        elif engine_of[i] in numbers:
            demand = Demand(demand.work, 0.0, 0.0, 0.0)  # it may take over engines that are there
        elif problem.app.nodes[i].name in problem.same_engine:
            demand = demand.between(window[i].head_s, window[i].tail_s)
            if engine_of[i] in shared:
                at = shared[engine_of[i]]
                demands[at] = demands[at].joined(demand)
                continue
            shared[engine_of[i]] = len(demands)
        else:
            ways[len(demands)] = _Ways(problem, scenario, i, window[i])
            demand = ways[len(demands)].known(demand)
        demands.append(demand)
    gpus = problem.cluster.num_gpus
    device_s = fitting_s(demands, gpus)
    while timed is not None:
        by_s = max(device_s, path_s)
        news = [at for at, way in ways.items() if way.simulated(demands[at], by_s, timed)]
        if not news:
            break
        for at in news:
            demands[at] = ways[at].known(demands[at])
        device_s = fitting_s(demands, gpus)
    return LowerBound(max(device_s, path_s), path_s, device_s)


class _Ways:
    """Ways to do a node in one go: at first what they take at least, then as simulated."""

    def __init__(
        self, problem: Problem, scenario: LengthScenario, node: int, window: Window
    ) -> None:
        """Look at all sizes and numbers of replicas.

        Args:
            problem: the instance.
            scenario: lengths.
            node: index of the node.
            window: in which it can be at work.
        """
        self._node, self._window = node, window
        # While a node waits for another it may be started again without losing time.
        self._waits = bool((problem.app.nodes[node].requests.input_node != node).any())
        self._least_start_s = min(problem.least_start_s(c) for _, c, _ in modes_of(problem, node))
        self._sizes: list[tuple[ModeKey, float, float]] = []
        sizes, counts, held_s = list[Ints](), list[Ints](), list[Floats]()
        for key, costs in problem.costs[node].items():
            if not problem.fits(node, key):
                continue
            held = least_held(problem, scenario, node, key)
            devices = key.tensor_parallel_size * key.pipeline_parallel_size
            most = problem.cluster.kinds.count(key.gpu) // devices
            counts.append(np.arange(1, most + 1))
            sizes.append(np.full(most, len(self._sizes)))
            held_s.append(held.seconds(counts[-1]))
            self._sizes.append((key, problem.first_ready_s(node, costs), held.start_s))
        self._size, self._replicas = np.concatenate(sizes), np.concatenate(counts)
        self._held_s = np.concatenate(held_s)
        per_replica = [k.tensor_parallel_size * k.pipeline_parallel_size for k, _, _ in self._sizes]
        self._devices = np.array(per_replica)[self._size] * self._replicas
        before_s = np.array([ready_s - start_s for _, ready_s, start_s in self._sizes])
        self._before_s = before_s[self._size]
        self._looked_up: set[int] = set()

    @property
    def _end_s(self) -> Floats:
        ends_s = np.maximum(self._before_s + self._held_s, self._window.end_s)
        return ends_s + self._window.tail_s

    def known(self, demand: Demand) -> Demand:
        """Return a node's demand with what is known of these ways."""
        window = self._window
        parted_s = window.end_s + window.tail_s + (0.0 if self._waits else self._least_start_s)
        demand = demand.between(window.head_s, window.tail_s)
        whole = InOneGo(self._devices, self._held_s.copy(), self._end_s)
        return replace(demand, whole=whole, parted_end_s=parted_s)

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
            key, _, start_s = self._sizes[self._size[k]]
            parallel = ParallelConfig(
                int(self._replicas[k]), key.tensor_parallel_size, key.pipeline_parallel_size
            )
            run_s = timed(self._node, parallel, key.gpu)
            if run_s is not None:
                news = True
                self._held_s[k] = max(start_s + run_s, self._held_s[k])
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
