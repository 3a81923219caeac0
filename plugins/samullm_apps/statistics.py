"""Lengths and counts with given statistics: laid out by quantiles, in an order from a seed."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from samullm_plugin.model.types import Floats, Ints


def normal_quantiles(count: int) -> Floats:
    """Return the standard normal's quantiles at the middles of ``count`` equal shares."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])


def lognormal_lengths(
    count: int, low: int, high: int, mean: float, sigma: float, rng: np.random.Generator
) -> Ints:
    """Return log-normal lengths with exactly these extremes and this mean (to one token or less).

    Args:
        count: how many.
        low: the least; one length has it.
        high: the most; one length has it.
        mean: of all, between the two.
        sigma: spread of the logarithm.
        rng: gives the order.
    """
    spread = np.exp(sigma * normal_quantiles(count))
    return _with_mean(lambda scale: scale * spread, low, high, mean, (1e-3, float(high)), rng)


def normal_lengths(
    count: int, low: int, high: int, mean: float, deviation: float, rng: np.random.Generator
) -> Ints:
    """Return normal lengths with these extremes and this mean; as :func:`lognormal_lengths`."""
    spread = deviation * normal_quantiles(count)
    return _with_mean(
        lambda shift: shift + spread, low, high, mean, (-10.0 * high, 10.0 * high), rng
    )


def _with_mean(
    shape: Callable[[float], Floats],
    low: int,
    high: int,
    mean: float,
    bracket: tuple[float, float],
    rng: np.random.Generator,
) -> Ints:
    """Return whole lengths ``shape(x)``, cut to the range, for the ``x`` that gives the mean."""

    def lengths(x: float) -> Ints:
        values = np.clip(np.rint(shape(x)), low, high).astype(np.int64)
        if len(values) > 2:
            values[0], values[-1] = low, high
        return values

    below, above = bracket
    for _ in range(80):
        middle = (below + above) / 2
        if lengths(middle).mean() < mean:
            below = middle
        else:
            above = middle
    found: Ints = rng.permutation(lengths(above))
    return found


def chunk_counts(documents: int, median: int, most: int) -> Ints:
    """Return chunks per document, most first: log-normal with this median and this maximum."""
    z = normal_quantiles(documents)
    sigma = np.log(most / median) / z[-1] if documents > 1 else 0.0
    counts = np.maximum(np.rint(median * np.exp(sigma * z)), 1).astype(np.int64)
    return np.sort(counts)[::-1].copy()
