"""Of many sizes of a model some are timed, and the others lie between them."""

from __future__ import annotations

import numpy as np
from samullm_tasks.sizes import between, far_apart


def test_sizes_that_are_timed_are_far_apart_and_include_both_ends() -> None:
    assert far_apart([1, 2, 3, 4, 5, 6, 7, 8, 9]) == [0, 1, 3, 7, 8]
    assert far_apart([3]) == [0]
    assert far_apart([4, 4, 6]) == [0, 2]


def test_values_between_are_linear_over_the_logarithm() -> None:
    devices, values = [1, 2, 4, 8], np.array([[8.0, 0.0], [2.0, 3.0]])
    found = between(devices, [0, 3], values)
    np.testing.assert_allclose(found, [[8, 0], [6, 1], [4, 2], [2, 3]])
    np.testing.assert_array_equal(between(devices, [0, 1, 2, 3], found), found)
