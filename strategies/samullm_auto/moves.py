"""Neighbours of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samullm_auto.recipe import Recipe, Split, by_shape
from samullm_auto.surrogate import MOMENTS
from samullm_plugin import ParallelConfig, Problem
from samullm_plugin.model.result import PlanTrace

MANY_CONFIGS, NEXT_SIZE = 16, 1.3
"""Of more configurations than the first, data-parallel sizes are offered in steps of the second."""


def offered(problem: Problem, node: int, most_devices: int) -> tuple[ParallelConfig, ...]:
    """Return the configurations of a node that the search considers.

    All of them on small clusters; on large ones the data-parallel sizes 1 to 4, then in steps, and
    the largest.

    Args:
        problem: the instance.
        node: index of the node.
        most_devices: leave out larger configurations, but never all.
    """
    every = problem.parallel_configs(node)
    configs = tuple(p for p in every if p.num_devices <= most_devices) or every[:1]
    if len(configs) <= MANY_CONFIGS:
        return configs
    kept: set[ParallelConfig] = set()
    for same in by_shape(configs):
        last = 0
        for p in same:
            size = p.data_parallel_size
            if size <= 4 or size >= NEXT_SIZE * last or p is same[-1]:
                kept.add(p)
                last = size
    return tuple(p for p in configs if p in kept)


class Moves:
    """Draws neighbours at random, more often of the models that hold devices longest.

    Attributes:
        weights: how likely each node is changed.
    """

    def __init__(
        self, problem: Problem, rng: np.random.Generator, modes: Sequence[Sequence[ParallelConfig]]
    ) -> None:
        """Prepare.

        Args:
            problem: the instance.
            rng: randomness.
            modes: configurations to choose from, by node.
        """
        self._problem, self._rng, self._modes = problem, rng, modes
        self._consumers = [i for i, up in enumerate(problem.app.upstreams) if up]
        self.weights = np.full(len(modes), 1.0 / len(modes))

    def focus(self, trace: PlanTrace) -> None:
        """Draw nodes by the device time they hold in a plan, and others now and then."""
        held = np.zeros(len(self._modes))
        for s in trace.segments:
            held[self._problem.app.index(s.node)] += (s.end_s - s.start_s) * len(s.devices)
        if held.sum() > 0:
            self.weights = 0.5 / len(held) + 0.5 * held / held.sum()

    def draw(self, recipe: Recipe) -> Recipe:
        """Return a neighbour."""
        kind = self._rng.random()
        if kind < 0.15 and self._consumers:
            node = int(self._rng.choice(self._consumers))
            return recipe.with_start(node, float(self._rng.choice((0.0, *MOMENTS, 1.0))))
        if kind < 0.4:
            return self._other_splits(recipe)
        if kind < 0.65 or len(recipe.order) == 1:
            return self._other_mode(recipe)
        if kind < 0.77:
            return self._swapped(recipe)
        if kind < 0.86:
            return self._moved(recipe)
        if kind < 0.94:
            return self._other_mode(self._other_mode(recipe))
        flags = self._rng.integers(3)
        return recipe.with_flags(
            strict=recipe.strict != (flags in (0, 2)), grow=recipe.grow != (flags in (1, 2))
        )

    def _node(self) -> int:
        return int(np.searchsorted(np.cumsum(self.weights), self._rng.random() * 0.999999))

    def _mode(self, node: int) -> ParallelConfig:
        return self._modes[node][int(self._rng.integers(len(self._modes[node])))]

    def _other_mode(self, recipe: Recipe) -> Recipe:
        node = self._node()
        return recipe.with_mode(node, self._mode(node))

    def _swapped(self, recipe: Recipe) -> Recipe:
        order = list(recipe.order)
        a, b = self._rng.choice(len(order), 2, replace=False)
        order[a], order[b] = order[b], order[a]
        return recipe.with_order(tuple(order))

    def _moved(self, recipe: Recipe) -> Recipe:
        order = list(recipe.order)
        node = order.pop(int(self._rng.integers(len(order))))
        order.insert(int(self._rng.integers(len(order) + 1)), node)
        return recipe.with_order(tuple(order))

    def _other_splits(self, recipe: Recipe) -> Recipe:
        splits = list(recipe.splits)
        if splits and self._rng.random() < 0.4:
            splits.pop(int(self._rng.integers(len(splits))))
            return recipe.with_splits(tuple(splits))
        node = self._node()
        split = Split(node, float(self._rng.choice(MOMENTS)), self._mode(node))
        others = [s for s in splits if s.node != node]
        return recipe.with_splits((*others, split))
