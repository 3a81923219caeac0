"""Clusters of several machines."""

from __future__ import annotations

import pytest

from samullm_plugin import Cluster, Gpu, InputError
from samullm_plugin.model.cluster import device_labels, device_list
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


def test_devices_are_named_by_machine_where_there_are_several() -> None:
    machines = Cluster((GPU,) * 5, (), ((0, 2, 4), (1, 3))).machines_if_several
    assert device_labels(5, machines) == ["m0:0", "m1:0", "m0:1", "m1:1", "m0:2"]
    assert device_list([4, 3, 2, 1], machines) == "m0:1-2 m1:0-1"
    assert device_list([1], machines) == "m1:0"
    pairs = tuple((2 * m, 2 * m + 1) for m in range(8))
    assert (
        device_list([0, *range(2, 9), 10, 11, 12, 13], pairs) == "m0:0 m1-m3:0-1 m4:0 m5:0-1 m6:0-1"
    )
    one = Cluster((GPU,) * 3).machines_if_several
    assert device_labels(3, one) == ["0", "1", "2"]
    assert device_list([2, 0, 1], one) == "0-2"
    assert device_list([0, 2], one) == "0,2"


def test_another_number_of_gpus_is_of_the_same_machines() -> None:
    small, big = Gpu("small", 1 << 30), Gpu("big", 2 << 30)
    cluster = Cluster((small, small, big, big), ((2, 3),), ((0, 1), (2, 3)))
    less = cluster.with_gpus(3)
    assert less.machines == ((0, 1), (2,))
    assert [g.name for g in less.gpus] == ["small", "small", "big"]
    more = cluster.with_gpus(7)
    assert more.machines == ((0, 1), (2, 3), (4, 5), (6,))
    assert (2, 3) in more.nvlink_groups
    assert [g.name for g in more.gpus[4:]] == ["small", "small", "big"]
    assert cluster.with_gpus(4) == cluster
