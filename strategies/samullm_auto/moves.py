"""Neighbours of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samullm_auto.recipe import Recipe, Split
from samullm_plugin import ParallelConfig, Problem

SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Shares of a node's requests at which something may change."""


class Moves:
    """Draws neighbours at random."""

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        """Look up what each node may be given."""
        self._modes: list[Sequence[ParallelConfig]] = [
            problem.parallel_configs(i) for i in range(len(problem.app.nodes))
        ]
        self._consumers = [i for i, up in enumerate(problem.app.upstreams) if up]
        self._rng = rng

    def simple(self, recipe: Recipe) -> Recipe:
        """Return a neighbour in modes, order or flags: what the surrogate can judge."""
        kind = self._rng.random()
        if kind < 0.45 or len(recipe.order) == 1:
            return self._other_mode(recipe)
        if kind < 0.65:
            return self._swapped(recipe)
        if kind < 0.8:
            return self._moved(recipe)
        if kind < 0.92:
            return self._other_mode(self._other_mode(recipe))
        flags = self._rng.integers(3)
        return recipe.with_flags(
            strict=recipe.strict != (flags in (0, 2)), grow=recipe.grow != (flags in (1, 2))
        )

    def any(self, recipe: Recipe) -> Recipe:
        """Return a neighbour of any kind, resized models and starts of consumers included."""
        kind = self._rng.random()
        if kind < 0.25 and self._consumers:
            node = int(self._rng.choice(self._consumers))
            return recipe.with_start(node, float(self._rng.choice((0.0, *SHARES, 1.0))))
        if kind < 0.55:
            return self._other_splits(recipe)
        return self.simple(recipe)

    def _node(self) -> int:
        return int(self._rng.integers(len(self._modes)))

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
        split = Split(node, float(self._rng.choice(SHARES)), self._mode(node))
        others = [s for s in splits if s.node != node]
        return recipe.with_splits((*others, split))
