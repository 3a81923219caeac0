"""Sizes of models by what they do alone per GPU, the best first, timed only where it matters.

Of many sizes of a shape some far apart are timed, and the others put between them
(:mod:`samullm_tasks.timing`). Larger ones are timed when they could be among those that are asked
for: with more replicas a model does at most as much in proportion, and each of them is started.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from samullm_tasks.timing import between, far_apart

from samullm_greedy.throughput import StageView, mean_throughput
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment
from samullm_plugin.model.problem import Problem
from samullm_plugin.simulator import Progress, Rollout

Step = tuple[str, ParallelConfig]
"""One ready node more, or one node on more GPUs than it has."""


@dataclass(slots=True)
class _Alone:
    """What a model does alone from some progress on.

    Attributes:
        bases: that progress by scenario; kept, for its ids are in the key.
        rates: by size that was timed, work per second and GPU.
        took_s: by size that was timed, the seconds until it has finished.
    """

    bases: list[Progress]
    rates: dict[ParallelConfig, float] = field(default_factory=dict)
    took_s: dict[ParallelConfig, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Entry:
    """A step with its rate, or with what this is at most if it is not ``known``."""

    step: Step
    rate: float = 0.0
    known: bool = False

    @property
    def devices(self) -> int:
        """Return the devices that the model has then."""
        return self.step[1].num_devices


@dataclass(slots=True)
class _Shape:
    """A model's sizes of one shape of a replica, by devices.

    Attributes:
        alone: what the model does.
        entries: one per size.
        load_s: seconds of an engine start by size, 0 if none is needed.
        apart: places of the sizes that may be timed.
    """

    alone: _Alone
    entries: list[_Entry]
    load_s: list[float]
    apart: list[int]

    def look_up(self) -> None:
        """Enter what is known of all sizes."""
        rates, took_s = self.alone.rates, self.alone.took_s
        devices = [e.devices for e in self.entries]
        first = self.entries[0].step[1]
        rate, work_s = rates[first], max(took_s[first] - self.load_s[0], 0.0)
        for k, entry in enumerate(self.entries):
            below, above = self.around(k)
            low, high = (rates.get(self.entries[n].step[1]) for n in (below, above))
            if low is not None and high is not None:
                entry.known, entry.rate = True, low
                if below < above:
                    some = [devices[below], devices[k], devices[above]]
                    entry.rate = float(between(some, [0, 2], np.array([[low], [high]]))[1, 0])
            else:
                share = devices[0] / devices[k]
                least_s = max(self.load_s[k] + work_s * share, 1e-9)
                entry.rate = rate * took_s[first] * share / least_s
                entry.known = rate == 0.0

    def around(self, place: int) -> tuple[int, int]:
        """Return the places of the sizes that are timed for one: its own, or those next to it."""
        at = bisect_left(self.apart, place)
        return self.apart[at if self.apart[at] == place else at - 1], self.apart[at]


class Ranking:
    """The sizes that models may get in a stage, ranked."""

    def __init__(self, problem: Problem) -> None:
        """Know nothing yet."""
        self._problem = problem
        self._kept: dict[tuple[object, ...], _Alone] = {}
        self._shapes: dict[tuple[str, int, int], _Shape] = {}
        self._drafts: Mapping[Step, Assignment] = {}
        self._views: Sequence[StageView] = ()
        self._entries: list[_Entry] = []

    def begin(
        self, rollout: Rollout, views: Sequence[StageView], drafts: Mapping[Step, Assignment]
    ) -> None:
        """Look at a stage that begins.

        Args:
            rollout: the stages so far.
            views: by length scenario.
            drafts: what may be done, with the assignment that each step is judged by; a node's
                sizes by devices.
        """
        self._drafts, self._views = drafts, views
        self._shapes.clear()
        by_node: dict[str, list[ParallelConfig]] = {}
        for name, parallel in drafts:
            by_node.setdefault(name, []).append(parallel)
        for name, sizes in by_node.items():
            self._add(rollout, name, sizes)
        self._time(shape.entries[0].step for shape in self._shapes.values())
        for shape in self._shapes.values():
            shape.look_up()
        found = {e.step: e for shape in self._shapes.values() for e in shape.entries}
        self._entries = [found[step] for step in drafts]
        self._sort()

    def _add(self, rollout: Rollout, name: str, sizes: Sequence[ParallelConfig]) -> None:
        """Enter a node's sizes."""
        problem, states = self._problem, rollout.states
        node, held = problem.app.index(name), rollout.held.get(name)
        free: set[ParallelConfig] = set().union(*(s.offered_sizes(node) for s in states))
        if held is not None:
            free.add(held.parallel)
        bases = [s.progress[node] for s in states]
        running = tuple(s.clock_s for s in states if name in s.active)
        key = name, running, frozenset(free), tuple(id(p) for p in bases)
        alone = self._kept.setdefault(key, _Alone(bases))
        by_shape: dict[tuple[int, int], list[ParallelConfig]] = {}
        for p in sizes:
            shape = p.tensor_parallel_size, p.pipeline_parallel_size
            by_shape.setdefault(shape, []).append(p)
        for shape, of_shape in by_shape.items():
            devices = self._drafts[name, of_shape[0]].devices
            load_s = problem.load_s(problem.mode(node, of_shape[0], devices))
            self._shapes[name, *shape] = _Shape(
                alone,
                [_Entry((name, p)) for p in of_shape],
                [0.0 if p in free else load_s for p in of_shape],
                far_apart([p.num_devices for p in of_shape]),
            )

    def best(self, limits: Mapping[str, tuple[int, int]], count: int) -> list[Step]:
        """Return the best steps, at most ``count``, those that do nothing left out.

        Args:
            limits: by node that is asked for, least and most devices.
            count: how many.
        """
        while True:
            found: list[_Entry] = []
            for entry in self._entries:
                least, most = limits.get(entry.step[0], (1, 0))
                if least <= entry.devices <= most and entry.rate > 0.0:
                    found.append(entry)
                    if len(found) == count:
                        break
            asked = [e.step for e in found if not e.known]
            if not asked:
                return [e.step for e in found]
            shapes: dict[int, _Shape] = {}
            steps: list[Step] = []
            for name, p in asked:
                shape = self._shapes[name, p.tensor_parallel_size, p.pipeline_parallel_size]
                place = next(k for k, e in enumerate(shape.entries) if e.step[1] == p)
                steps += [shape.entries[k].step for k in shape.around(place)]
                shapes[id(shape)] = shape
            self._time(steps)
            for shape in shapes.values():
                shape.look_up()
            self._sort()

    def _time(self, steps: Iterable[Step]) -> None:
        """Simulate what is not known of these steps, at once."""
        shapes = self._shapes
        new = {
            (name, p): shapes[name, p.tensor_parallel_size, p.pipeline_parallel_size].alone
            for name, p in steps
        }
        new = {step: alone for step, alone in new.items() if step[1] not in alone.rates}
        drafts = [self._drafts[step] for step in new]
        for view in self._views:
            view.prefetch(drafts)
        for ((_, p), alone), draft in zip(new.items(), drafts, strict=True):
            alone.rates[p] = mean_throughput(self._views, (draft,)) / p.num_devices
            alone.took_s[p] = max(view.took_s(draft) for view in self._views)

    def _sort(self) -> None:
        """Sort by rate; of equals the first stays first."""
        self._entries.sort(key=lambda e: -e.rate)
