"""Functions of several variables given on grids that may have holes."""

from __future__ import annotations

from itertools import product

import numpy as np

from samullm_plugin.model.types import Floats


def fill_holes(values: Floats, axes: tuple[Floats, ...]) -> Floats:
    """Return ``values`` with every NaN replaced.

    A hole between known points of a line along an axis lies on the straight line between them; one
    beyond them takes the slope of the last two, but no falling one; one before them takes the
    first. Longer axes, whose points are closer, come first; all holes between points are filled
    before any beyond them.

    Args:
        values: shape by the axes' lengths, NaN where nothing is known; not all NaN.
        axes: increasing coordinates.
    """
    filled = values.copy()
    order = sorted(range(len(axes)), key=lambda k: -len(axes[k]))
    for beyond in (False, True):
        for axis in order:
            if not np.isnan(filled).any():
                return filled
            lines = np.moveaxis(filled, axis, -1)
            flat = lines.reshape(-1, len(axes[axis]))
            flat = _fill_lines(flat, axes[axis], beyond=beyond)
            filled = np.ascontiguousarray(np.moveaxis(flat.reshape(lines.shape), -1, axis))
    return filled


def _fill_lines(lines: Floats, x: Floats, *, beyond: bool) -> Floats:
    """Return lines along ``x`` with the holes between known points filled, or also the others.

    Args:
        lines: shape ``(m, len(x))``.
        x: increasing coordinates.
        beyond: fill the holes before the first and after the last known point of a line.
    """
    known = ~np.isnan(lines)
    place = np.arange(len(x))
    before = np.maximum.accumulate(np.where(known, place, -1), axis=1)
    after = np.minimum.accumulate(np.where(known, place, len(x))[:, ::-1], axis=1)[:, ::-1]
    some = known.any(axis=1, keepdims=True)
    row = np.arange(len(lines))[:, None]
    result = lines.copy()

    inside = ~known & (before >= 0) & (after < len(x))
    low, high = np.maximum(before, 0), np.minimum(after, len(x) - 1)
    share = (x - x[low]) / np.where(high > low, x[high] - x[low], 1.0)
    line = lines[row, low] + share * (lines[row, high] - lines[row, low])
    result[inside] = line[inside]
    if not beyond:
        return result

    ahead = ~known & (before < 0) & some
    result[ahead] = lines[row, high][ahead]
    last = before[:, -1:]
    previous = np.where(known & (place < last), place, -1).max(axis=1, keepdims=True)
    two = previous >= 0
    rise = lines[row, np.maximum(last, 0)] - lines[row, np.maximum(previous, 0)]
    run = x[np.maximum(last, 0)] - x[np.maximum(previous, 0)]
    slope = np.where(two, np.maximum(rise, 0) / np.where(run > 0, run, 1.0), 0.0)
    past = ~known & (place > last) & some
    line = lines[row, np.maximum(last, 0)] + slope * (x - x[np.maximum(last, 0)])
    result[past] = line[past]
    return result


class Grid:
    """A function on a full grid, linear in each variable between its points.

    Below the first coordinate of an axis it keeps the first value; beyond the last one the last
    segment goes on.
    """

    def __init__(self, axes: tuple[Floats, ...], values: Floats) -> None:
        """Keep the grid.

        Args:
            axes: increasing coordinates, at least two each.
            values: shape by the axes' lengths, finite.
        """
        self.axes = axes
        strides = np.array([s // values.itemsize for s in np.ascontiguousarray(values).strides])
        self._strides = strides[:, None]
        self._offsets = np.array(list(product((0, 1), repeat=len(axes)))) @ strides
        self._flat = np.ascontiguousarray(values).ravel()

    def at(self, *arguments: Floats) -> Floats:
        """Return the values at ``m`` points, one array of shape ``(m,)`` per axis."""
        count = len(arguments[0])
        cells = np.empty((len(self.axes), count), dtype=np.int64)
        shares = np.empty((len(self.axes), count))
        for k, (axis, x) in enumerate(zip(self.axes, arguments, strict=True)):
            cell = np.minimum(np.searchsorted(axis[1:], x, side="right"), len(axis) - 2)
            cells[k] = cell
            shares[k] = (np.maximum(x, axis[0]) - axis[cell]) / (axis[cell + 1] - axis[cell])
        first = (cells * self._strides).sum(axis=0)
        weights = np.ones((1, count))
        for share in shares:  # corners in the order of product(): the last axis changes fastest
            pair = np.stack((1 - share, share))
            weights = (weights[:, None, :] * pair[None, :, :]).reshape(2 * len(weights), count)
        found = self._flat[self._offsets[:, None] + first]
        return np.asarray((found * weights).sum(axis=0))
