"""Clusters of several machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samullm_plugin import Cluster, Gpu, InputError
from samullm_plugin.model.cluster import FreeDevices, Network
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.shared_gpus import Sharing, share_gpus
from samullm_plugin.planning.reporting import device_labels, device_list, part_lines
from samullm_plugin.run.charts import device_names

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


NETWORK = Network(1e10, 1e-4)


def of_machines(sizes: Sequence[int], network: Network | None = NETWORK) -> Cluster:
    """Return machines of so many devices, all of one joined by NVLink."""
    machines, first = [], 0
    for size in sizes:
        machines.append(tuple(range(first, first + size)))
        first += size
    return Cluster((GPU,) * first, tuple(machines), tuple(machines), network=network)


def test_a_replica_with_room_on_no_machine_lies_on_as_few_as_can_be() -> None:
    cluster = of_machines([4, 4, 2])
    asked = {(1, 4): 1, (4, 2): 2, (2, 4): 2, (2, 3): 3, (1, 6): 2, (1, 8): 2, (4, 3): 1}
    assert {size: cluster.machines_per_replica("g", *size) for size in asked} == asked
    assert cluster.replicas_by_machine("g", 4, 3) == [0, 0, 0]  # only two machines have four
    assert not any(of_machines([4, 4], None).replicas_by_machine("g", 4, 2))
    assert cluster.find_devices(range(10), ParallelConfig(1, 4, 2)) == tuple(range(8))
    # One stage on the small machine, and the others where most is free.
    assert cluster.find_devices({0, 1, 4, 5, 8, 9}, ParallelConfig(1, 2, 3)) == (0, 1, 4, 5, 8, 9)
    assert cluster.find_devices({0, 1, 2, 3, 4, 5}, ParallelConfig(1, 4, 2)) is None


def test_stages_find_a_machine_with_room_for_all_of_them() -> None:
    """Not the one with the fewest free devices, if those are too few."""
    cluster = of_machines([2, 2], None)
    assert cluster.find_devices({1, 2, 3}, ParallelConfig(1, 1, 2)) == (2, 3)


def test_what_keeps_a_replica_from_lying_on_several_machines_is_said() -> None:
    cluster = of_machines([2, 2, 2])
    assert cluster.replica_violation((0, 1, 4, 5), 2) is None
    assert cluster.replica_violation((0, 1, 2, 3), 1) is None
    assert "2 machines with 2 pipeline stages on each" in str(
        cluster.replica_violation((0, 2, 1, 3), 1)
    )
    assert "do not lie on 2 machines" in str(cluster.replica_violation((0, 2, 3, 4), 1))
    assert "lie on several machines" in str(cluster.replica_violation((0, 2), 1))
    split = Cluster((GPU,) * 6, ((0, 1), (3, 4)), ((0, 1, 2), (3, 4, 5)), network=NETWORK)
    assert "not in one NVLink group" in str(split.replica_violation((0, 1, 4, 5), 2))


def test_a_size_keeps_its_machines_when_some_are_lost() -> None:
    """What a replica costs was found with all machines there."""
    small, big = Gpu("g", 1 << 30), Gpu("g", 2 << 30)
    whole = Cluster((big,) * 4 + (small,) * 4, (), ((0, 1, 2, 3), (4, 5), (6, 7)), network=NETWORK)
    left = whole.subset([2, 4, 5, 6, 7])
    assert left.kinds == ("g with 2 GiB", *["g with 1 GiB"] * 4)
    assert left.find_devices(range(5), ParallelConfig(1, 1, 4)) == (1, 2, 3, 4)
    lone = whole.subset([4, 5])
    assert lone.kinds == ("g with 1 GiB",) * 2
    same = of_machines([4, 2, 2]).subset([4, 5, 6, 7])
    assert same.find_devices(range(4), ParallelConfig(1, 1, 4)) is None  # it had room on one


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 6),
    st.sets(st.integers(0, 24), max_size=6),
)
def test_as_many_replicas_as_there_is_room_for_find_devices(
    sizes: list[int], tp: int, pp: int, shunned: set[int]
) -> None:
    cluster = of_machines(sizes)
    most = sum(cluster.replicas_by_machine("g", tp, pp))
    free = FreeDevices(cluster, range(cluster.num_gpus))
    if most:
        parallel = ParallelConfig(most, tp, pp)
        devices = free.copy().take(parallel, avoid=shunned)
        assert devices is not None
        assert len(set(devices)) == parallel.num_devices
        for first in range(0, len(devices), tp * pp):
            assert cluster.replica_violation(devices[first : first + tp * pp], tp) is None
    assert free.take(ParallelConfig(most + 1, tp, pp)) is None


def shared_pairs() -> Cluster:
    """Two NVLink pairs on two machines: one whole, one of which two engines share each GPU."""
    whole = Cluster((GPU,) * 4, ((0, 1), (2, 3)), ((0, 1), (2, 3)))
    return share_gpus(whole, [Sharing()] * 2 + [Sharing(2, 1.5)] * 2)


def test_parts_of_a_gpu_are_devices_of_their_own_kind() -> None:
    cluster = shared_pairs()
    assert cluster.kinds == ("g", "g", *["g shared by 2 (x 1.5)"] * 4)
    assert [g.memory_bytes for g in cluster.gpus] == [1 << 30] * 2 + [1 << 29] * 4
    assert cluster.cards == ((0,), (1,), (2, 3), (4, 5))
    assert cluster.machines == ((0, 1), (2, 3, 4, 5))
    assert cluster.size_text == "4 GPUs (6 devices)"
    assert part_lines(cluster) == ["devices m1:0-3: 2 parts of each of GPUs 2-3"]
    assert part_lines(Cluster.uniform(GPU, 4)) == []
    assert cluster.host_bytes(0) == cluster.host_bytes(1)
    left = cluster.subset([0, 3, 4, 5])
    assert (left.cards, left.kinds) == (
        ((0,), (1,), (2, 3)),
        (cluster.kinds[0], *cluster.kinds[3:]),
    )


def test_a_replica_is_on_different_gpus() -> None:
    """NCCL refuses to have one GPU twice."""
    cluster = shared_pairs()
    two = ParallelConfig(1, 2)
    assert cluster.find_devices([2, 3], two) is None
    assert cluster.find_devices([2, 3, 5], two) == (3, 5)
    assert cluster.find_devices(range(2, 6), ParallelConfig(2, 2)) == (2, 4, 3, 5)
    assert cluster.replica_violation((2, 3), 2) == "devices [2, 3] are parts of one GPU"
    assert cluster.replica_violation((2, 3), 1) == "devices [2, 3] are parts of one GPU"
    assert cluster.replica_violation((2, 4), 2) is None


def test_an_nvlink_group_of_whole_and_shared_gpus_is_divided() -> None:
    mixed = share_gpus(Cluster((GPU,) * 3, ((0, 1, 2),)), [Sharing(), *[Sharing(3, 2.0)] * 2])
    assert mixed.nvlink_groups == ((0,), (1, 4), (2, 5), (3, 6))


def test_another_number_of_shared_gpus_counts_gpus() -> None:
    cluster = shared_pairs()
    assert cluster.with_gpus(4) == cluster
    assert cluster.with_gpus(3).cards == ((0,), (1,), (2, 3))
    assert cluster.with_gpus(7).cards[4:] == ((6,), (7,), (8, 9))


def test_kinds_that_hardly_differ_have_labels_of_their_own() -> None:
    """What a replica costs hangs on the label."""
    nearly = replace(GPU, memory_bytes=GPU.memory_bytes + 1)
    whole = Cluster((GPU, nearly, GPU, GPU))
    sharing = [Sharing(), Sharing(), Sharing(2, 1.2000001), Sharing(2, 1.2000002)]
    assert len(set(share_gpus(whole, sharing).kinds)) == 4


def test_which_parts_are_where_is_told_machine_by_machine() -> None:
    whole = Cluster((GPU,) * 3, (), ((0, 1), (2,)))
    cluster = share_gpus(whole, [Sharing(), *[Sharing(2, 1.5)] * 2])
    assert part_lines(cluster) == ["devices m0:1-2 m1:0-1: 2 parts of each of GPUs 1-2"]
    one = share_gpus(Cluster((GPU,)), [Sharing(3, 1.5)])
    assert part_lines(one) == ["devices 0-2: 3 parts of GPU 0"]
    assert device_names(one) == [f"device {d} (GPU 0)" for d in range(3)]
    assert device_names(whole) == ["GPU m0:0", "GPU m0:1", "GPU m1:0"]


def test_parts_of_a_gpu_are_on_one_machine() -> None:
    half = Gpu("g", 1 << 29, engines=2, slowdown=1.5)
    with pytest.raises(InputError, match=r"cards joins devices \[0, 1\], which are on several"):
        Cluster((half, half), (), ((0,), (1,)), cards=((0, 1),))
    with pytest.raises(InputError, match="cards names device 0 twice"):
        Cluster((half, half), cards=((0, 1), (0,)))
