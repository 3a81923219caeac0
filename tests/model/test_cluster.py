"""Clusters of several machines."""

from __future__ import annotations

import pytest

from samullm_plugin import Cluster, Gpu, InputError
from samullm_plugin.model.parallel import ParallelConfig

GPU = Gpu("g", 1 << 30)


def test_nvlink_across_machines_is_refused() -> None:
    with pytest.raises(InputError, match=r"nvlink_groups joins devices \[1, 2\]"):
        Cluster((GPU,) * 4, ((0,), (1, 2), (3,)), ((0, 1), (2, 3)))


def test_a_subset_keeps_groups_and_machines() -> None:
    whole = Cluster((GPU,) * 8, ((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 1, 2, 3), (4, 5, 6, 7)))
    left = whole.subset([1, 4, 5, 6])
    assert left.nvlink_groups == ((0,), (1, 2), (3,))
    assert left.machines == ((0,), (1, 2, 3))
    assert left.find_devices(range(4), ParallelConfig(1, 2)) == (1, 2)
    with pytest.raises(InputError, match="at least one GPU"):
        whole.subset([])


def test_devices_are_addressed_by_machine() -> None:
    two = Cluster((GPU,) * 4, (), ((0, 2), (1, 3)))
    assert two.address(3) == "3 (machine 1, device 1)"
    assert Cluster((GPU,) * 2).address(1) == "1"
