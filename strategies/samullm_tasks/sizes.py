"""Of many sizes of a model some are timed; the others lie between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samullm_plugin.model.types import Floats

APART = 2.0
"""Ratio of two sizes that are timed (a choice)."""


def far_apart(devices: Sequence[int]) -> list[int]:
    """Return the indices of the first and the last size, and between them of some far apart.

    Args:
        devices: of the sizes, not decreasing.
    """
    kept: list[int] = []
    for k, size in enumerate(devices):
        if not kept or size >= APART * devices[kept[-1]] or k == len(devices) - 1:
            kept.append(k)
    return kept


def between(devices: Sequence[int], timed: Sequence[int], values: Floats) -> Floats:
    """Return values for all sizes, linear over the logarithm of their devices.

    Args:
        devices: of all sizes.
        timed: indices of those that have values, increasing.
        values: theirs, shape ``(len(timed), n)``.

    Returns:
        Shape ``(len(devices), n)``.
    """
    wanted, at = np.log(devices), np.log([devices[k] for k in timed])
    return np.column_stack([np.interp(wanted, at, column) for column in values.T])
